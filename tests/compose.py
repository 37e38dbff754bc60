"""compose.yaml as Docker would read it: merged, and its variables filled in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?::([-?])([^}]*))?\})")


def services(environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The services by name; raises `KeyError` for a variable that must be set and is not."""
    return dict(_filled(document()["services"], environment))


def document() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "compose.yaml").read_text()))


def _filled(value: Any, environment: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(part, environment) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, environment) for part in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        dollar, name, operator, text = match.groups()
        if dollar:
            return "$"
        if environment.get(name):
            return environment[name]
        if operator == "-":
            return text
        raise KeyError(f"{name}: {text}")

    return _VARIABLE.sub(fill, value)
