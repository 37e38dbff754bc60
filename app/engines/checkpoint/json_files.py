"""The JSON files of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.errors import ConfigError


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a model's folder; empty if there is no such file."""
    content = load_json(file, missing={})
    if not isinstance(content, dict):
        raise ConfigError(f"{file} does not hold a JSON object.")
    return content


def class_names(given: object) -> list[str]:
    """The `architectures` of a config.json; none if it says nothing of them."""
    names = given or []
    if not (isinstance(names, list) and all(isinstance(each, str) for each in names)):
        raise ConfigError("architectures in config.json is to be a list of names of classes.")
    return names


def load_json(file: Path, missing: Any) -> Any:
    """What a JSON file holds, or `missing` if there is no such file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return missing
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
