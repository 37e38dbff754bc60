"""An upstream's answer, piece by piece or whole, and what became of a request.

Nothing that an upstream sends is trusted: what is not as the protocol says is `Lost`, and its texts
are in no error of ours, since they may quote the prompt.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from typing import Any, Final

from app.engines.base import LEAST_LOGPROB, TokenLogprob
from app.jobs import FinishReason

MAX_LINE: Final = 16_000_000
MAX_TOKENS: Final = 2**31 - 1
MAX_COST: Final = Decimal(1_000_000)
_ID_PREFIX: Final = "token_id:"


class Lost(Exception):
    """No answer: it broke off, took too long, or was no answer at all."""


class Unreachable(Exception):
    """The request cannot have been begun."""


class Overloaded(Exception):
    """The upstream has too much to do. `asked_s` is how long it asks to be spared."""

    def __init__(self, asked_s: float | None) -> None:
        super().__init__()
        self.asked_s = asked_s


class Denied(Exception):
    """The upstream does not let us in, or does not know the model: it is of no use as it is set."""


class Refused(Exception):
    """The upstream says that the request is wrong. `code` is its short word for that."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__()
        self.status = status
        self.code = code


_REASONS: Final = {"length": FinishReason.LENGTH, "max_tokens": FinishReason.LENGTH}
_ODD_ENDS: Final = ("content_filter", "tool_calls", "function_call", "error", "abort")


@dataclass(slots=True)
class Answer:
    """What has come so far."""

    most_pieces: int = MAX_TOKENS  #: an answer of more has no end
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    embedding: list[float] | None = None
    num_pieces: int = 0
    began_ns: int = 0  #: when the first piece came, by the monotonic clock
    end: str | None = None  #: the upstream's finish_reason
    input_tokens: int | None = None
    cached_tokens: int = 0
    output_tokens: int | None = None
    cost: Decimal | None = None

    @property
    def text(self) -> str:
        """Halves of characters that belong together are one; others become U+FFFD."""
        halves = "".join(self.texts).encode("utf-16-le", "surrogatepass")
        return halves.decode("utf-16-le", errors="replace")

    @property
    def finish_reason(self) -> FinishReason:
        if self.end in _ODD_ENDS:
            return FinishReason.ERROR
        return _REASONS.get(self.end or "", FinishReason.STOP)

    def take(self, event: object, *, logprobs: int = 0) -> None:
        """One event of a stream, or the whole answer. Raises `Lost` if it is neither."""
        try:
            self._take(event, logprobs)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise Lost("its answer is not as the protocol says") from None

    def _take(self, event: Any, logprobs: int) -> None:
        if event.get("error"):
            raise Lost("it reported an error")
        for data in event.get("data") or ():
            self.embedding = [_number(each) for each in data["embedding"]]
        for choice in (event.get("choices") or ())[:1]:
            part = choice.get("delta") or choice.get("message") or {}
            text = choice.get("text") or part.get("content") or ""
            if not isinstance(text, str):
                raise TypeError
            if text:
                self.texts.append(text)
            self.num_pieces += 1
            if self.num_pieces > self.most_pieces:
                raise Lost("its answer does not end")
            self.began_ns = self.began_ns or time.monotonic_ns()
            self.token_ids += map(_token_id, choice.get("token_ids") or ())
            if choice.get("logprobs"):
                self.logprobs += _logprobs(choice["logprobs"], logprobs)
            if (end := choice.get("finish_reason")) is not None:
                self.end = str(end)
        if usage := event.get("usage"):
            self._take_usage(usage)

    def _take_usage(self, usage: Any) -> None:
        self.input_tokens = _count(usage.get("prompt_tokens"))
        details = usage.get("prompt_tokens_details") or {}
        self.cached_tokens = _count(details.get("cached_tokens") or 0)
        if usage.get("completion_tokens") is not None:
            self.output_tokens = _count(usage["completion_tokens"])
        if (cost := usage.get("cost")) is not None:
            self.cost = _money(cost)


def events(lines: bytes) -> Iterator[object]:
    """The events of whole lines of a stream, None for its end. Raises `Lost` for what is no JSON.

    Lines end with a line feed alone: a text in them may well hold the other ends of lines.
    """
    for line in lines.split(b"\n"):
        name, _, data = line.strip().partition(b":")
        if name == b"data" and data:
            yield None if data.strip() == b"[DONE]" else parsed(data)


def parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise Lost("its answer is no JSON") from None


def judge(status: int, body: bytes, retry_after: str | None, now: datetime) -> None:
    """Raise what an answer other than 200 means."""
    if status == 200:
        return
    code = _code(body)
    if status in (429, 503, 529):
        raise Overloaded(asked_s(retry_after, now))
    if status in (401, 402, 403, 404) or code == "insufficient_quota":
        raise Denied(f"it answers {status}")
    if 400 <= status < 500 and status not in (408, 409, 425, 499):
        raise Refused(status, code)
    raise Lost(f"it answers {status}")


def asked_s(retry_after: str | None, now: datetime) -> float | None:
    """Seconds of a Retry-After header, as a number or a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            at = parsedate_to_datetime(retry_after)
        except (ValueError, TypeError, OverflowError):
            return None
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        seconds = (at - now).total_seconds()
    return seconds if 0 <= seconds < math.inf else None


def _code(body: bytes) -> str:
    """The error's short word, if it is one."""
    try:
        error = json.loads(body)["error"]
        code = error.get("code") or error.get("type") or ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    is_word = isinstance(code, str) and len(code) <= 64 and code.replace("_", "").isalnum()
    return code if is_word and code.isascii() else ""


def _logprobs(found: Any, most: int) -> Iterator[TokenLogprob]:
    """OpenAI's lists for completions, with tokens as vLLM writes their ids."""
    tops = found.get("top_logprobs") or [None] * len(found["tokens"])
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True):
        ranked = sorted((top or {}).items(), key=lambda each: -_finite(each[1]))[:most]
        yield TokenLogprob(
            _named(token), _finite(logprob), tuple((_named(name), _finite(x)) for name, x in ranked)
        )


def _named(token: str) -> int:
    if not token.startswith(_ID_PREFIX):
        raise ValueError
    return _token_id(int(token.removeprefix(_ID_PREFIX)))


def _token_id(value: Any) -> int:
    return _count(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _finite(logprob: Any) -> float:
    return LEAST_LOGPROB if logprob == -math.inf else max(_number(logprob), LEAST_LOGPROB)


def _money(value: Any) -> Decimal:
    try:
        cost = Decimal(str(value))
    except InvalidOperation:
        raise ValueError from None
    if not 0 <= cost <= MAX_COST:
        raise ValueError
    return cost
