"""What a batch is asked with, and what is wrong with it in OpenAI's own words. Pure.

https://platform.openai.com/docs/api-reference/batch/create
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final

from app.errors import InvalidType, InvalidValue, MissingParameter, RequestError
from app.requests.bodies import Url
from app.requests.part import printable
from app.requests.storable import parse_metadata, refuse_unstorable
from app.webhooks.urls import HookUrl, parse_url

ENDPOINTS: Final = tuple(Url)

WINDOW: Final = "24h"

MIN_EXPIRY_S: Final = 3_600
MAX_EXPIRY_S: Final = 2_592_000

_NAMES: Final = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A request for a batch that is right."""

    url: Url
    input_file: str | None  #: None: its lines are in the request itself
    metadata: dict[str, str]
    output_expires_s: int | None
    idempotency_key: str | None
    webhook_url: HookUrl | None = None

    def fingerprint(self, lines: str) -> str:
        """Hex SHA-256 of what is asked for, with that of the lines that came along."""
        told = [self.url, self.input_file or lines, self.metadata, self.output_expires_s]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def parse(value: object, *, is_inline: bool, header: str | None) -> BatchRequest:
    """Check the body but for its lines; `header` is the key of `Idempotency-Key`. Raises
    `RequestError`. Fields that are not known are left out."""
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", param="body")
    input_file = value.get("input_file_id")
    if is_inline and input_file is not None:
        raise RequestError("Give 'input_file_id' or 'requests', not both.", param="requests")
    if not is_inline:
        input_file = _text(value, "input_file_id")
        if len(input_file) > 200:
            raise InvalidValue("'input_file_id' is no id of a file.", param="input_file_id")
        refuse_unstorable(input_file, "input_file_id")
    url = _endpoint(_text(value, "endpoint"))
    window = _text(value, "completion_window") if "completion_window" in value else WINDOW
    if window != WINDOW:
        told = printable(window)
        raise InvalidValue(
            f"Invalid value for 'completion_window': '{told}'. Supported values are: '{WINDOW}'.",
            param="completion_window",
        )
    return BatchRequest(
        url,
        input_file,
        metadata_of(value.get("metadata")),
        _expiry(value.get("output_expires_after")),
        _key(value.get("idempotency_key"), header),
        parse_url(_text(value, "webhook_url")) if value.get("webhook_url") is not None else None,
    )


def _text(value: dict[str, Any], name: str) -> str:
    given = value.get(name)
    if given is None:
        raise MissingParameter(f"Missing required parameter: '{name}'.", param=name)
    if not isinstance(given, str):
        raise _wrong_type(name, "a string", given)
    return given


def _wrong_type(name: str, wanted: str, given: object) -> InvalidType:
    got = _NAMES.get(type(given), "something else")
    return InvalidType(
        f"Invalid type for '{name}': expected {wanted}, but got {got} instead.", param=name
    )


def _endpoint(given: str) -> Url:
    try:
        return Url(given)
    except ValueError:
        known = [f"'{url}'" for url in ENDPOINTS]
        raise InvalidValue(
            f"Invalid value: '{printable(given)}'. Supported values are: "
            f"{', '.join(known[:-1])}, and {known[-1]}.",
            param="endpoint",
        ) from None


def metadata_of(given: object) -> dict[str, str]:
    """Labels, checked. Raises `RequestError` in OpenAI's words."""
    if given is not None and not isinstance(given, dict):
        raise _wrong_type("metadata", "an object", given)
    for key, value in (given or {}).items():
        if not isinstance(value, str):
            raise _wrong_type(f"metadata.{printable(key)}", "a string", value)
    return parse_metadata(given)


def _expiry(given: object) -> int | None:
    if given is None:
        return None
    name = "output_expires_after"
    if not isinstance(given, dict):
        raise _wrong_type(name, "an object", given)
    if given.get("anchor") != "created_at":
        raise InvalidValue(f"'{name}.anchor' must be created_at.", param=f"{name}.anchor")
    seconds = given.get("seconds")
    if type(seconds) is not int:
        raise _wrong_type(f"{name}.seconds", "an integer", seconds)
    if not MIN_EXPIRY_S <= seconds <= MAX_EXPIRY_S:
        raise InvalidValue(
            f"'{name}.seconds' must be from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}.",
            param=f"{name}.seconds",
        )
    return seconds


def _key(given: object, header: str | None) -> str | None:
    if given is None:
        return header
    if not isinstance(given, str):
        raise _wrong_type("idempotency_key", "a string", given)
    if not 0 < len(given) <= 255:
        raise InvalidValue("'idempotency_key' has 1 to 255 characters.", param="idempotency_key")
    refuse_unstorable(given, "idempotency_key")
    if header not in (None, given):
        raise RequestError(
            "The header Idempotency-Key and the field idempotency_key differ.",
            param="idempotency_key",
        )
    return given


def line_of(item: dict[str, Any], url: Url, number: int) -> dict[str, Any]:
    """A request of the body as a line of a file: what every line says need not be said."""
    named = {"custom_id": f"request-{number}", "method": "POST", "url": url}
    return named | {key: each for key, each in item.items() if each is not None}
