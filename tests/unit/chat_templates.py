"""Small chat templates in the formats of model families, with turns, tools, calls and thoughts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken

from app.engines.text.tokenizer import FileTokenizer
from tests.unit import tiny_tokenizers

_TURNS: Final = "<|im_start|>{{ m.role }}\n"

QWEN: Final = (
    "{%- if tools %}<|im_start|>system\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n"
    '</tools>\n<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n{% endif -%}'
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n"
    "{%- else %}<|im_start|>{{ m.role }}\n"
    "{%- if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{- m.content }}"
    "{%- for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""Qwen 3: calls as Hermes writes them, and thoughts that can be turned off."""

R1: Final = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""DeepSeek R1: the prompt itself begins the thought."""

LLAMA: Final = (
    "{%- if tools %}<|im_start|>system\n"
    '{"name": function name, "parameters": dictionary}\n'
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif -%}"
    "{%- for m in messages %}<|im_start|>{{ 'ipython' if m.role == 'tool' else m.role }}\n"
    "{%- if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    '{{- \'{"name": "\' + f.name + \'", "parameters": \' }}{{ f.arguments | tojson }}}'
    "{%- else %}{{ m.content | trim }}{% endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Llama 3.1: a call is the whole answer."""

MISTRAL: Final = (
    "{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{%- for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{%- elif m.role == 'tool' %}"
    "{%- if m.tool_call_id | length != 9 %}{{ raise_exception('wrong id') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{%- elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{{ ", " if not loop.last }}{% endfor %}]</s>'
    "{%- else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
"""Mistral: marks that are special tokens."""

PLAIN: Final = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Neither tools nor thoughts."""

PARTS: Final = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{%- if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Contents as lists of parts, as models that see have them."""

TURNS: Final = ("<|im_start|>", "<|im_end|>")
PLAIN_MARKS: Final = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def tokenizer_of(
    folder: Path, template: str, *, special: tuple[str, ...] = (), **config: Any
) -> FileTokenizer:
    """A tokenizer of bytes with this template; `special` are special tokens of its own."""
    file = tiny_tokenizers.byte_level()
    file.add_special_tokens([AddedToken(each, special=True) for each in (*TURNS, *special)])
    plain = [each for each in PLAIN_MARKS if each not in special]
    file.add_tokens([AddedToken(each, special=False) for each in plain])
    tiny_tokenizers.save(file, folder, config)
    (folder / "chat_template.jinja").write_text(template)
    return FileTokenizer(folder, tiny_tokenizers.SETTINGS)
