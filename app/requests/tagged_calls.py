"""Calls whose arguments stand in tags, as Qwen 3 Coder and GLM 4.5 write them. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from app.engines.sampling.grammar import JSON_STYLE
from app.requests.calls import JSON, Call, call_of, literals
from app.requests.tools import Function


@dataclass(frozen=True, slots=True)
class TaggedFormat:
    """A call is `open`, each argument, and `close`; NAME, KEY and VALUE stand in them. A value that
    is a text by the function's schema is written as it is, every other one as JSON."""

    signs: tuple[str, ...]
    open: str
    key: str
    value_end: str
    close: str
    call: re.Pattern[str]  #: with the groups `name` and `arguments`
    argument: re.Pattern[str]  #: with the groups `key` and `value`

    @property
    def marks(self) -> tuple[str, ...]:
        return ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>",
                "</arg_value>")  # fmt: skip

    @property
    def openers(self) -> tuple[str, ...]:
        """As those of `ToolFormat`."""
        return self.signs[:2] if self.signs[1].startswith("<function") else self.signs[:1]

    def read(self, text: str, functions: Sequence[Function]) -> tuple[str, list[Call]]:
        """What is said, and the calls; if these cannot be read, all is said and there are none."""
        by_name = {each.name: _properties(each) for each in functions}
        said, calls, at = [], [], 0
        for found in self.call.finditer(_up_to_last(self.close.split(), text)):
            known = by_name.get(found["name"], {})
            inside = _up_to_last([self.value_end.strip()], found["arguments"])
            given = {
                each["key"]: _value(each["value"], known.get(each["key"]))
                for each in self.argument.finditer(inside)
            }
            try:
                calls.append(call_of(found["name"], given))
            except (ValueError, RecursionError):
                return text, []
            said.append(text[at : found.start()].strip())
            at = found.end()
        said.append(text[at:].strip())
        return ("\n".join(filter(None, said)), calls) if calls else (text, [])

    def grammar(
        self, functions: Sequence[Function], *, many: bool, special: Mapping[str, int]
    ) -> str:
        """As that of `ToolFormat`."""
        literal = literals(special)
        rules = []
        for place, function in enumerate(functions):
            schema = json.loads(function.schema_text)
            needed = {*schema.get("required", ())}
            parts = [literal(self.open.replace("NAME", function.name))]
            for number, (key, of_key) in enumerate(_properties(function).items()):
                rule = f"call{place}v{number}"
                argument = f"{literal(self.key.replace('KEY', key))} {rule}"
                parts.append(argument if key in needed else f"({argument})?")
                rules.append(_rule(rule, of_key, schema, literal(self.value_end)))
            rules.append(f"call{place}: {' '.join(parts)} {literal(self.close)}")
        choice = " | ".join(f"call{place}" for place in range(len(functions)))
        more = f" ({literal(chr(10))} call)*" if many else ""
        return "\n".join([f"call{more}", f"call: {choice}", *rules])


def _up_to_last(ends: Sequence[str], text: str) -> str:
    """Nothing is looked for behind the last end: what is begun there is not ended."""
    return text[: max(text.rfind(end) + len(end) if end in text else 0 for end in ends)]


def _rule(rule: str, of_key: Any, schema: dict[str, Any], end: str) -> str:
    """Of a value up to behind its end."""
    if _is_text(of_key):
        choices = of_key.get("enum") if isinstance(of_key, dict) else None
        if choices:
            texts = " | ".join(json.dumps(each, ensure_ascii=False) for each in choices)
            return f"{rule}: ({texts}) {end}"
        stop = f"[suffix={end}]" if end.startswith('"') and end.count('"') == 2 else ""
        return f"{rule}{stop}: /(?s:.*)/{'' if stop else f' {end}'}"
    own = of_key if isinstance(of_key, dict) else {}
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    whole = json.dumps({**own, **shared, "x-guidance": JSON_STYLE}, ensure_ascii=False)
    return f"{rule}: {rule}j {end}\n{rule}j: %json {whole}"


def _properties(function: Function) -> dict[str, Any]:
    found = json.loads(function.schema_text).get("properties")
    return found if isinstance(found, dict) else {}


def _is_text(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "string"


def _value(written: str, schema: Any) -> Any:
    if _is_text(schema):
        return written
    try:
        return JSON.decode(written)
    except (ValueError, RecursionError):
        return written


TAGGED: Final = (
    TaggedFormat(
        ("<tool_call>", "<function=", "<parameter="),
        "<tool_call>\n<function=NAME>\n",
        "<parameter=KEY>\n",
        "\n</parameter>\n",
        "</function>\n</tool_call>",
        re.compile(
            r"(?:<tool_call>\s*)?<function=(?P<name>[^>\n]{1,64})>(?P<arguments>.*?)</function>"
            r"(?:\s*</tool_call>)?",
            re.DOTALL,
        ),
        re.compile(
            r"<parameter=(?P<key>[^>\n]{1,200})>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL
        ),
    ),
    TaggedFormat(
        ("<tool_call>", "<arg_key>", "<arg_value>"),
        "<tool_call>NAME\n",
        "<arg_key>KEY</arg_key>\n<arg_value>",
        "</arg_value>\n",
        "</tool_call>",
        re.compile(
            r"<tool_call>\s*(?P<name>[\w.-]{1,64})\s*(?P<arguments>.*?)</tool_call>", re.DOTALL
        ),
        re.compile(
            r"<arg_key>(?P<key>[^<]{1,200})</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
            re.DOTALL,
        ),
    ),
)
