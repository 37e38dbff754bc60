"""How models write that a function is to be called. Pure.

Which format a model was trained on is told from its chat template's own text, which writes calls of
before in it. An answer is read leniently, with blanks and keys as models vary them; what cannot be
read as calls is what was said. One that has to be a call is written by a grammar in llguidance's
Lark notation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from app.requests.calls import JSON, Call, arguments_of, call_of, literals
from app.requests.tagged_calls import TAGGED, TaggedFormat
from app.requests.tools import Function


@dataclass(frozen=True, slots=True)
class Pattern:
    """How calls are written: `open`, then each call with `between` them, then `close`. In `call`
    stand NAME and ARGUMENTS."""

    call: str
    open: str = ""
    between: str = ""
    close: str = ""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    signs: tuple[str, ...]  #: a template that has all of these is of this format
    pattern: Pattern
    begin: re.Pattern[str]  #: behind it is JSON; a group `name` says what these are arguments of
    end: re.Pattern[str]  #: what may be behind the JSON
    is_bare: bool = False  #: without marks: the whole answer, and of known functions alone

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts of its pattern that may be special tokens of a model."""
        written = "\n".join((self.pattern.open, self.pattern.call, self.pattern.close, *self.signs))
        return tuple(dict.fromkeys(_MARK.findall(written)))

    @property
    def openers(self) -> tuple[str, ...]:
        """Texts with one of which calls begin: before the first of them all is said."""
        begun = (_MARK.match(each) for each in (self.pattern.open, self.pattern.call))
        return tuple(found[0] for found in begun if found)

    def read(self, text: str, functions: Sequence[Function]) -> tuple[str, list[Call]]:
        """What is said, and the calls; if these cannot be read, all is said and there are none."""
        try:
            said, calls = self._read(text)
        except (ValueError, RecursionError):
            return text, []
        names = {each.name for each in functions}
        is_odd = self.is_bare and (said or not all(each.name in names for each in calls))
        return (text, []) if is_odd or not calls else (said, calls)

    def _read(self, text: str) -> tuple[str, list[Call]]:
        """Raises `ValueError` for what is no call."""
        said: list[str] = []
        calls: list[Call] = []
        at = 0
        find = self.begin.match if self.is_bare else self.begin.search
        while found := find(text, at):
            said.append(text[at : found.start()].strip())
            value, at = JSON.raw_decode(text, found.end())
            name = found.groupdict().get("name")
            calls += _calls(value) if name is None else [call_of(name, value)]
            if end := self.end.match(text, at):
                at = end.end()
        said.append(text[at:].strip())
        return "\n".join(filter(None, said)), calls

    def grammar(
        self, functions: Sequence[Function], *, many: bool, special: Mapping[str, int]
    ) -> str:
        """Lark: the expression of calls, then rules that it names, all of which begin with `call`.
        `special` are the ids of the model's special tokens by their text."""
        write = self.pattern
        literal = literals(special)
        more = f" ({literal(write.between)} call)*" if many else ""
        lines = [f"{literal(write.open)} call{more} {literal(write.close)}"]
        places = range(len(functions))
        lines.append("call: " + " | ".join(f"call{place}" for place in places))
        for place, function in enumerate(functions):
            before, after = write.call.replace("NAME", function.name, 1).split("ARGUMENTS")
            lines.append(f"call{place}: {literal(before)} call{place}a {literal(after)}")
            lines.append(f"call{place}a: %json {arguments_of(function)}")
        return "\n".join(lines)


_MARK: Final = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")


def _calls(value: Any) -> Iterator[Call]:
    """The calls in a JSON object or a list of them."""
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, dict):
            raise ValueError("A call is an object.")
        called = each["function"] if isinstance(each.get("function"), dict) else each
        names = (called[key] for key in ("name", "tool_name") if key in called)
        given = (called[key] for key in ("arguments", "parameters") if key in called)
        yield call_of(next(names, None), next(given, {}))


_NAME: Final = r"(?P<name>[\w.-]+)"
_OBJECT: Final = '{"name": "NAME", "arguments": ARGUMENTS}'
_PARAMETERS: Final = '{"name": "NAME", "parameters": ARGUMENTS}'


def _marked(begin: str, end: str, call: str = _OBJECT, *, is_list: bool = False) -> ToolFormat:
    """Calls as JSON between two marks, each by itself or all as a list."""
    if is_list:
        pattern = Pattern(call, f"{begin}[", ", ", f"]{end}")
    else:
        pattern = Pattern(f"{begin}\n{call}\n{end}", between="\n")
    return ToolFormat(
        (begin,),
        pattern,
        re.compile(rf"{re.escape(begin)}\s*"),
        re.compile(rf"\s*{re.escape(end)}" if end else r"(?!)"),
    )


_DEEPSEEK_BEGIN: Final = (
    r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?\s*"
    r"(?P<name>[\w.-]+)\s*(?:<｜tool▁sep｜>)?\s*(?:```json)?\s*"
)
_DEEPSEEK_END: Final = r"\s*(?:```)?\s*<｜tool▁call▁end｜>(?:\s*<｜tool▁calls▁end｜>)?"

FORMATS: Final[tuple[ToolFormat | TaggedFormat, ...]] = (
    *TAGGED,
    # DeepSeek V3 and R1
    ToolFormat(
        ("<｜tool▁call▁begin｜>", "```json"),
        Pattern(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```"
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "\n",
            "<｜tool▁calls▁end｜>",
        ),
        re.compile(_DEEPSEEK_BEGIN),
        re.compile(_DEEPSEEK_END),
    ),
    # DeepSeek V3.1
    ToolFormat(
        ("<｜tool▁call▁begin｜>",),
        Pattern(
            "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "",
            "<｜tool▁calls▁end｜>",
        ),
        re.compile(_DEEPSEEK_BEGIN),
        re.compile(_DEEPSEEK_END),
    ),
    # Kimi K2
    ToolFormat(
        ("<|tool_call_begin|>",),
        Pattern(
            "<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>ARGUMENTS"
            "<|tool_call_end|>",
            "<|tool_calls_section_begin|>",
            "",
            "<|tool_calls_section_end|>",
        ),
        re.compile(
            r"(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*(?:functions\.)?"
            r"(?P<name>[\w.-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*"
        ),
        re.compile(r"\s*<\|tool_call_end\|>(?:\s*<\|tool_calls_section_end\|>)?"),
    ),
    # Mistral, from its eleventh tokenizer on
    ToolFormat(
        ("[TOOL_CALLS]", "[ARGS]"),
        Pattern("[TOOL_CALLS]NAME[ARGS]ARGUMENTS"),
        re.compile(rf"\[TOOL_CALLS\]\s*{_NAME}\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*"),
        re.compile(r"(?!)"),
    ),
    # Mistral before
    _marked("[TOOL_CALLS]", "", is_list=True),
    # Phi 4
    ToolFormat(
        ("<|tool_call|>", "<|/tool_call|>"),
        Pattern(_OBJECT, "<|tool_call|>[", ", ", "]<|/tool_call|>"),
        re.compile(r"<\|tool_call\|>\s*"),
        re.compile(r"\s*<\|/tool_call\|>"),
    ),
    # Granite
    _marked("<|tool_call|>", "", is_list=True),
    # Command R7B and A
    _marked(
        "<|START_ACTION|>",
        "<|END_ACTION|>",
        '{"tool_call_id": "0", "tool_name": "NAME", "parameters": ARGUMENTS}',
        is_list=True,
    ),
    # InternLM
    ToolFormat(
        ("<|action_start|>", "<|plugin|>"),
        Pattern(f"<|action_start|><|plugin|>\n{_PARAMETERS}<|action_end|>"),
        re.compile(r"<\|action_start\|>\s*<\|plugin\|>\s*"),
        re.compile(r"\s*<\|action_end\|>"),
    ),
    # Hermes, Qwen 2.5 and 3, and many others
    _marked("<tool_call>", "</tool_call>"),
    # Llama 3
    ToolFormat(
        ('"parameters": ',),
        Pattern(_PARAMETERS, between="; "),
        re.compile(r"\s*(?:<\|python_tag\|>\s*)?(?=\{)"),
        re.compile(r"\s*[;,]"),
        is_bare=True,
    ),
)


@lru_cache(maxsize=64)
def format_of(template: str) -> ToolFormat | TaggedFormat | None:
    """The format of a chat template by its source, if it is one that is known."""
    found = (each for each in FORMATS if all(sign in template for sign in each.signs))
    return next(found, None)
