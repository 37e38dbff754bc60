"""Data that nobody means and somebody sends: good messages and requests, bent by chance.

A good one is changed in a few places: a value is replaced by an odd one, left out, put in a list;
or its bytes are damaged. All chance is that of the `Random` given, so a seed repeats it, and
hypothesis can drive it and cut it down.
"""

from __future__ import annotations

import base64
import copy
import json
from random import Random
from typing import Any, Final
from uuid import UUID

from app.broker.message import raw_message
from app.jobs import Kind

SECRET: Final = "the miller's secret"
"""In every prompt: no log may show it."""

NUMBERS: Final = (
    0, 1, -1, 2, 3, 0.0, -0.0, 0.5, 1e-50, 1e-320, 1e308, -1e308, float("nan"), float("inf"), 255,
    32_768, 2**31, 2**31 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**40, 99_999_999,
)  # fmt: skip
TIMES: Final = (
    "9999-12-31T23:59:59-05:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999+00:00",
    "2999-01-01T00:00:00Z", "2020-01-01T00:00:00", "2030-02-30T00:00:00Z", "infinity", "-infinity",
    "now", "2030-01-01", "10000-01-01T00:00:00Z", "2030-01-01T24:00:00Z", "2030-W01", "20300101",
)  # fmt: skip
TEXTS: Final = (
    "", " ", "0", "1", "-1", "1e400", "true", "null", "\0", "a\0b", "\ud800", "\udfff\ud800",
    "☕" * 200, "e\u0301", "\u202e", "'; DROP TABLE jobs; --", "%s", "{}", "\\u0000", "x" * 300,
    "x" * 40_000, "application/json", "utf-8", "base64", "stub", "stub-embed", "inference.generate",
    "inference.embed", "inference.*", "\n", "a\r\nb", "9" * 5_000,
)  # fmt: skip
IDS: Final = (
    "urn:uuid:00000000-0000-4000-8000-00000000000a", "{00000000-0000-4000-8000-00000000000b}",
    "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "0000000000004000800000000000000c", "00000000-0000-4000-8000-00000000000D", "order 42",
)  # fmt: skip
LISTS: Final[tuple[Any, ...]] = (
    [], [1], [None], [[]], [[[[[]]]]], {}, {"": 1}, {"a": {"b": {"c": 1}}}, ["a"] * 33,
    [f"text {n}" for n in range(33)], [["a"]] * 3, [0] * 2_000, [2**70], [{"role": "user"}],
    {"type": "json_schema"}, {"type": "json_object"}, [True, False], {"a": float("nan")},
    {"__type__": "uuid", "__value__": 1}, {f"key {n}": "x" * 500 for n in range(20)},
)  # fmt: skip
WORDS: Final = (None, True, False)
ODD: Final[tuple[tuple[Any, ...], ...]] = (WORDS, NUMBERS, TIMES, TEXTS, IDS, LISTS)

FIELDS: Final[dict[str, tuple[Any, ...]]] = {
    "prompt": (SECRET, [SECRET] * 3, [f"{SECRET} {n}" for n in range(33)], [1, 2, 3], [[1], [2]]),
    "input": (SECRET, [SECRET] * 33, [f"text {n}" for n in range(33)], [[1, 2]] * 33),
    "messages": ([{"role": "user", "content": SECRET}],),
    "model": ("stub", "stub-embed", "stub-classify", "stub-rerank", "gpt-9"),
    "query": (SECRET,),
    "documents": ([SECRET] * 3, [{"text": SECRET}], [], [SECRET] * 2_049),
    "text_1": (SECRET, [SECRET] * 2),
    "text_2": (SECRET, [SECRET] * 2, [SECRET] * 3),
    "top_n": (0, 1, 2**31),
    "truncate_prompt_tokens": (-1, 0, 1, 512, 2**31),
    "use_activation": (False,),
    "n": (1, 2, 32, 33, 10_000),
    "max_tokens": (1, 16, 100_000),
    "max_completion_tokens": (1, 16),
    "temperature": (0, 1.0, 1e-50, 2),
    "top_p": (1.0, 1e-50, 0.5),
    "top_k": (0, 1, -1, 2**31),
    "min_p": (0, 1, 1e-50),
    "seed": (0, 2**63 - 1, -(2**63), 2**64),
    "stop": ("x", ["x", "y"], [""]),
    "logprobs": (True, 0, 5),
    "top_logprobs": (0, 20),
    "repetition_penalty": (1.0, 1e-50, 1e38),
    "frequency_penalty": (2, -2),
    "ignore_eos": (True,),
    "response_format": ({"type": "json_object"}, {"type": "text"}),
    "encoding_format": ("float", "base64"),
    "dimensions": (0, 1, 8, 9),
    "user": ("u",),
    "url": ("/v1/completions", "/v1/embeddings", "/v1/classify", "/score", "/v2"),
    "metadata": ({"a": "b"}, {"a": "\0"}, {"a" * 65: "b"}),
    "of_a_later_version": (1,),
}
"""Of the body of a request, each with values that mean something to it."""

HEADERS: Final = (
    "id", "task", "lang", "eta", "eta", "expires", "expires", "timelimit", "timelimit", "retries",
    "root_id", "parent_id", "group", "group_index", "argsrepr", "kwargsrepr", "origin",
    "compression", "stamps", "stamped_headers", "shadow", "ignore_result", "meth", "redelivered",
    "more", "more", "num_jobs",
)  # fmt: skip
PROPERTIES: Final = (
    "priority", "priority", "priority", "delivery_tag", "correlation_id", "reply_to",
    "delivery_mode", "body_encoding", "delivery_info",
)  # fmt: skip
OPTIONS: Final = ("callbacks", "errbacks", "chain", "chord")


def message(rng: Random, job_id: UUID, queue: str) -> bytes:
    """A bare message as it lies in a list of Redis."""
    item = json.loads(raw_message(job_id, Kind.GENERATE, {"prompt": SECRET}, queue=queue))
    body: Any = [[], request(rng), {}]
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
        match rng.randrange(6):
            case 0 | 1:
                _bend(rng, item["headers"], rng.choice(HEADERS))
            case 2 | 3:
                _bend(rng, item["properties"], rng.choice(PROPERTIES))
            case 4:
                body = _bent_body(rng, body)
            case 5:
                name = rng.choice(("content-type", "content-encoding", "headers", "properties"))
                item[name] = _odd(rng)
                if not isinstance(item["headers"], dict) or not isinstance(
                    item["properties"], dict
                ):
                    break
    item["body"] = base64.b64encode(json.dumps(body).encode()).decode()
    if rng.randrange(16) == 0:
        item["body"] = rng.choice(("QUJ", "größer", 5, None, ["e30="], body))
    raw = json.dumps(item).encode()
    return _damaged(rng, raw) if rng.randrange(8) == 0 else raw


def submission(rng: Random) -> dict[str, Any]:
    """What is posted to /v1/jobs."""
    given: dict[str, Any] = {"body": request(rng)}
    for _ in range(rng.choice((0, 1, 2))):
        name = rng.choice(("priority", "deadline", "not_before", "metadata", "url", "kind", "more"))
        _bend(rng, given, name)
    return given


def stored(rng: Random) -> tuple[Any, int]:
    """A request as a row may hold it, by whatever version of Gristmill, and its format."""
    body = _odd(rng) if rng.randrange(6) == 0 else request(rng)
    return body, rng.choice((1, 1, 1, 2, 32_767))


_TEXTS: Final = ("text_1", "text_2")


def request(rng: Random) -> dict[str, Any]:
    """The body of an OpenAI-style call."""
    fields = rng.choice(
        (("prompt",), ("prompt",), ("input",), ("messages",), ("query", "documents"), _TEXTS)
    )
    body: dict[str, Any] = {field: rng.choice(FIELDS[field]) for field in fields}
    for name in rng.sample(tuple(FIELDS), rng.choice((0, 0, 1, 1, 2, 4))):
        body[name] = rng.choice(FIELDS[name])
        if rng.randrange(3) == 0:
            _bend(rng, body, name)
    return body


def _odd(rng: Random, likely: tuple[Any, ...] = ()) -> Any:
    if likely and rng.randrange(3):
        return rng.choice(likely)
    return copy.deepcopy(rng.choice(rng.choice(ODD)))


_LIKELY: Final[dict[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("eta", "expires", "deadline", "not_before"), TIMES),
    "priority": WORDS + NUMBERS,
    "timelimit": ([1, 2], [None, 1e-50], [2**70, 1], ["1", None], [float("inf")] * 2, [-1, -1]),
    "id": IDS,
}
"""Odd values that are of about the right kind."""


def _bend(rng: Random, fields: dict[str, Any], name: str) -> None:
    """Replace a value, leave it out, or wrap it up."""
    match rng.randrange(8):
        case 0:
            fields.pop(name, None)
        case 1:
            fields[name] = [fields.get(name)] * rng.choice((1, 2))
        case _:
            fields[name] = _odd(rng, _LIKELY.get(name, ()))


def _bent_body(rng: Random, body: Any) -> Any:
    if not isinstance(body, list) or len(body) < 3:
        return body
    match rng.randrange(5):
        case 0:
            return _odd(rng)
        case 1:
            return body[: rng.randrange(3)]
        case 2:
            return [_odd(rng), *body[1:]]
        case 3:
            return [body[0], _odd(rng), body[2]]
        case _:
            return [*body[:2], {rng.choice(OPTIONS): _odd(rng)}]


def _damaged(rng: Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw))
    match rng.randrange(4):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        case 2:
            return raw[:at] + raw[: rng.randrange(60)] + raw[at:]
        case _:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(60)))
