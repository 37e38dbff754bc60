"""A conversation and a tool for tests, and what becomes of them with a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from app.engines.base import Generation
from app.engines.text.tokenizer import FileTokenizer
from app.jobs import FinishReason
from app.requests import replies
from app.requests.bodies import parse
from app.requests.prepare import Prepared, prepare
from tests.unit import tiny_tokenizers

USER: Final = {"role": "user", "content": "Grind it."}
PARAMETERS: Final = {
    "type": "object",
    "properties": {"fine": {"type": "boolean"}},
    "required": ["fine"],
    "additionalProperties": False,
}
TOOL: Final = {
    "type": "function",
    "function": {"name": "grind", "description": "Grinds.", "parameters": PARAMETERS},
}
CALL: Final = {
    "id": "a1b2c3d4e",
    "type": "function",
    "function": {"name": "grind", "arguments": '{"fine": true}'},
}
Make = Callable[..., FileTokenizer]


def prepared(tokenizer: FileTokenizer, **body: Any) -> Prepared:
    request = parse({"messages": [USER], "max_tokens": 64, **body})
    return prepare(request, tokenizer, tiny_tokenizers.SETTINGS)


def shown(tokenizer: FileTokenizer, **body: Any) -> str:
    """The prompt, special tokens and all."""
    [prompt] = prepared(tokenizer, **body).prompts
    return tokenizer.decode(prompt, skip_special_tokens=False)


def answered(tokenizer: FileTokenizer, text: str, **body: Any) -> dict[str, Any]:
    """The choice that an answer of this text becomes."""
    request = parse({"messages": [USER], "max_tokens": 64, **body})
    made = prepare(request, tokenizer, tiny_tokenizers.SETTINGS)
    ids = tokenizer._file.encode(text, add_special_tokens=False).ids
    plain = tokenizer.decode(ids)
    answer = Generation(1, FinishReason.STOP, ids, plain)
    told = replies.body(
        request, [answer], job_id="1", model="m", created=0, tokenizer=tokenizer,
        prompts=made.prompts,
    )  # fmt: skip
    return dict(told["choices"][0])
