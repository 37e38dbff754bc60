"""A line of a batch: what is asked, or what is wrong with it, in the words of OpenAI's batches.

Pure. https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import from_json

from app.batches import Door
from app.errors import RequestError
from app.requests import json_text
from app.requests.bodies import Url
from app.requests.part import printable
from app.requests.storable import refuse_unstorable
from app.store.batch_work import LineError

MAX_ID: Final = 512
"""Characters of a line's `custom_id`."""

Knows = Callable[[Url, str], bool]
"""Whether a model of this name serves this call."""

_NEEDED: Final = {
    Url.CHAT: "messages",
    Url.MESSAGES: "messages",
    Url.RESPONSES: "input",
    Url.COMPLETIONS: "prompt",
    Url.EMBEDDINGS: "input",
}
_STREAMS: Final = {
    Url.CHAT: "Chat Completions",
    Url.COMPLETIONS: "Completions",
    Url.RESPONSES: "Responses",
    Url.MESSAGES: "Messages",
}


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is right, as far as that can be seen without its model."""

    custom_id: str
    body: dict[str, Any]
    model: str


class WrongLine(Exception):
    """What is wrong with a line."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param

    def at(self, number: int) -> LineError:
        return LineError(self.code, str(self), number, self.param)


TOO_LONG: Final = WrongLine("request_too_large", "This line is longer than a request may be.")


def parse(raw: bytes, door: Door, url: Url) -> Line:
    """Raises `WrongLine`. Its body is checked when it becomes a job, but for its model."""
    value = _value(raw)
    custom_id = _required(value, "custom_id")
    if not isinstance(custom_id, str):
        raise WrongLine(
            "invalid_type", "Invalid type for 'custom_id': expected a string.", "custom_id"
        )
    if not 0 < len(custom_id) <= MAX_ID:
        raise WrongLine("invalid_value", f"'custom_id' has 1 to {MAX_ID} characters.", "custom_id")
    try:
        refuse_unstorable(custom_id, "custom_id")
    except RequestError as error:
        raise WrongLine("invalid_value", error.message, "custom_id") from None
    if door is Door.ANTHROPIC:
        body = _required(value, "params")
    else:
        _check_call(value, url)
        body = _required(value, "body")
    if not isinstance(body, dict):
        raise WrongLine("invalid_type", "Invalid type for 'body': expected an object.", "body")
    if body.get("stream"):
        name = _STREAMS.get(url, str(url))
        raise WrongLine(
            "streaming_unsupported",
            f"{name}: Streaming is not supported in the Batch API.",
            "body.stream",
        )
    return Line(custom_id, body, _model(body, url))


def custom_id_of(raw: bytes) -> str:
    """Of a line that may be wrong; empty if it has none."""
    try:
        custom_id = _value(raw).get("custom_id")
        refuse_unstorable(custom_id, "custom_id")
    except (WrongLine, RequestError):
        return ""
    return custom_id[:MAX_ID] if isinstance(custom_id, str) else ""


def _value(raw: bytes) -> dict[str, Any]:
    try:
        json_text.refuse_crowded(raw)
        value = from_json(raw.removeprefix(b"\xef\xbb\xbf"))
    except RequestError as error:
        raise WrongLine("invalid_request", error.message) from None
    except ValueError:
        raise WrongLine("invalid_json_line", "This line is not parseable as valid JSON.") from None
    if not isinstance(value, dict):
        raise WrongLine("invalid_json_line", "This line is not a JSON object.")
    return value


def _required(value: dict[str, Any], name: str) -> Any:
    if value.get(name) is None:
        raise WrongLine(
            "missing_required_parameter", f"Missing required parameter: '{name}'.", name
        )
    return value[name]


def _check_call(value: dict[str, Any], url: Url) -> None:
    if _required(value, "method") != "POST":
        raise WrongLine("invalid_method", "Only the method POST is supported.", "method")
    given = _required(value, "url")
    try:
        is_same = Url(given) is url
    except ValueError:
        is_same = False
    if not is_same:
        raise WrongLine(
            "invalid_url",
            "The URL provided for this request does not match the batch endpoint.",
            "url",
        )


def _model(body: dict[str, Any], url: Url) -> str:
    model = body.get("model")
    if model is None:
        raise WrongLine("invalid_request", "Model parameter is required.", "body.model")
    if not isinstance(model, str):
        raise WrongLine(
            "invalid_type", "Invalid type for 'model': expected a string.", "body.model"
        )
    needed = _NEEDED.get(url)
    if needed and body.get(needed) is None:
        sentence = f"{needed.capitalize()} parameter is required."
        raise WrongLine("invalid_request", sentence, f"body.{needed}")
    return model


def unknown_model(model: str) -> WrongLine:
    return WrongLine(
        "model_not_found",
        f"The provided model '{printable(model)}' is not supported by the Batch API.",
        "body.model",
    )
