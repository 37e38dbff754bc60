"""A call that a model asks for, read from JSON and written by a grammar. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from app.engines.sampling.grammar import JSON_STYLE
from app.requests.storable import is_unicode
from app.requests.tools import Function


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str  #: a JSON object, as text


def call_of(name: Any, arguments: Any) -> Call:
    """Raises `ValueError` for what is no call."""
    if isinstance(arguments, str):  # written twice
        arguments = JSON.decode(arguments or "{}")
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise ValueError("A call has a name, and an object of arguments.")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not is_unicode(text):  # half of a surrogate pair, which JSON can spell
        text = json.dumps(arguments, allow_nan=False)
    return Call(name.encode(errors="replace").decode().replace("\0", "\ufffd"), text)


def literals(special: Mapping[str, int]) -> Callable[[str], str]:
    """Lark of a text that is to be written as it stands, special tokens in it as such."""
    longest_first = sorted((each for each in special if each), key=len, reverse=True)
    tokens = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if special else "((?!))")

    def literal(text: str) -> str:
        parts = (
            f"<[{special[part]}]>" if part in special else json.dumps(part, ensure_ascii=False)
            for part in tokens.split(text)
            if part
        )
        return " ".join(parts)

    return literal


def arguments_of(function: Function) -> str:
    """The schema of its arguments, written as all JSON is."""
    schema = json.loads(function.schema_text)
    return json.dumps({"type": "object"} | schema | {"x-guidance": JSON_STYLE}, ensure_ascii=False)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


JSON: Final = json.JSONDecoder(parse_constant=_constant)
"""Raises `ValueError` also for what only Python writes, and `RecursionError`."""
