"""Whatever anybody may push into Redis: mostly a good message, anything in places."""

from __future__ import annotations

import base64
import json
import math
from datetime import UTC, timedelta, timezone
from typing import Any, Final
from uuid import uuid4

from hypothesis import strategies as st

from app.requests.bodies import BODIES

WITHOUT_END: Final = st.sampled_from([10**400, -(10**400), math.inf, -math.inf, math.nan])
NUMBERS: Final = (
    st.integers(-3, 12)
    | st.sampled_from([2**15, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400, -(10**400)])
    | st.sampled_from([0.5, 3.0, -0.0, 1e-50, 5e-324, 1e-300, 1e300, math.nan, math.inf, -math.inf])
    | st.floats()
)
TEXTS: Final = (
    st.text(max_size=8)
    | st.text(st.characters(categories=["Cs", "Cc", "L"]), max_size=4)
    | st.sampled_from(
        [
            "",
            "5",
            "\0",
            "\ud800",
            "1e999",
            "x" * 300,
            "0001-01-01T00:00:00+14:00",
            "9999-12-31T23:59:59-05:00",
            "2030-01-01",
            "2030-W01-1T24:00",
            "/v1/embeddings",
            "json_object",
            "celery",
        ]
    )
)
SCALARS: Final = st.none() | st.booleans() | NUMBERS | TEXTS
MARKED: Final = st.fixed_dictionaries(
    {
        "__type__": st.sampled_from(["datetime", "uuid", "decimal", "bytes", "base64", "mill"]),
        "__value__": SCALARS | st.just("2030-01-01T00:00:00") | st.just("1" * 32),
    }
)
"""What kombu's JSON turns into an object of its own kind."""
ANYTHING: Final = st.recursive(
    SCALARS | MARKED,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


FIELDS: Final = sorted({name for body in BODIES.values() for name in body.model_fields})
_FORMS: Final = st.sampled_from(
    [
        {"response_format": {"type": "json_object"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"maximum": 10**400}},
            }
        },
        {"structured_outputs": {"regex": "(a|b)"}},
        {"stop": ["\n", "x"]},
        {"encoding_format": "base64"},
        {"prompt": [[1, 2], [3]]},
        {"prompt": ["a", "b"]},
        {"input": [1, 2**31]},
        {"truncate_prompt_tokens": -1},
        {"truncate_prompt_tokens": 2**31 - 1},
        {"dimensions": 3},
        {"input_type": "query"},
        {"use_activation": False},
        {"top_n": 2**31 - 1, "return_documents": True},
    ]
)
_UNIT: Final = st.floats(0, 1) | st.sampled_from([1e-50, 5e-324, 1e-300, 0, 1])
_SIGNED: Final = st.floats(-2, 2) | st.sampled_from([1e-50, -5e-324, 2, -2])
_SAMPLING: Final = st.fixed_dictionaries(
    {},
    optional={
        "temperature": _UNIT | st.floats(0, 2),
        "top_p": _UNIT,
        "min_p": _UNIT,
        "top_k": st.integers(0, 60) | st.just(2**31 - 1),
        "repetition_penalty": _UNIT | st.floats(0, 10),
        "frequency_penalty": _SIGNED,
        "presence_penalty": _SIGNED,
        "seed": st.integers(-(2**63), 2**63 - 1) | st.just(2**63 - 1),
        "n": st.integers(1, 4),
        "max_tokens": st.integers(1, 40),
        "ignore_eos": st.booleans(),
    },
)
_METADATA: Final = st.just({}) | st.dictionaries(
    st.text(min_size=1, max_size=5), st.text(max_size=5), max_size=3
).map(lambda pairs: {"metadata": pairs})


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request: good, with the strangest numbers that are allowed, or with anything in a field."""
    base: dict[str, Any] = draw(
        st.sampled_from(
            [
                {"prompt": "flour"},
                {"input": ["flour", "water"]},
                {"input": [["flour", "water"]], "url": "/v1/classify"},
                {"query": "flour", "documents": ["water", {"text": "meal"}]},
                {"input": ["flour", "water"], "target_language": "deu_Latn"},
                {"input": "flour", "url": "/v1/translations", "num_beams": 3},
                {"text_1": "flour", "text_2": ["water", "meal"]},
                {"messages": [{"role": "user", "content": "flour"}]},
            ]
        )
    )
    if base.keys() & {"prompt", "messages", "target_language"}:
        base = base | draw(_SAMPLING)
    match draw(st.sampled_from(["good", "good", "form", "spoiled"])):
        case "form":
            base = base | draw(_FORMS)
        case "spoiled":
            names = st.sampled_from([*FIELDS, "url", "metadata", "color"])
            base = base | draw(st.dictionaries(names, ANYTHING, max_size=2))
    return draw(_METADATA) | base


TIMES: Final = (
    st.datetimes(timezones=st.sampled_from([None, timezone(timedelta(hours=-12)), UTC])).map(
        lambda stamp: stamp.isoformat()
    )
    | TEXTS
)
_OPTIONS: Final = {
    "eta": TIMES,
    "expires": TIMES,
    "timelimit": st.lists(
        st.none() | st.integers(0, 60) | WITHOUT_END | NUMBERS, min_size=2, max_size=2
    ),
    "retries": ANYTHING,
    "group": ANYTHING,
    "request_format": st.integers(0, 3),
    "more": st.lists(st.builds(lambda: str(uuid4())) | TEXTS, max_size=3),
    "num_jobs": ANYTHING,
}


def _tasks(request: dict[str, Any]) -> list[str]:
    """The tasks that a request may be sent as."""
    if "input" in request:
        return ["inference.embed", "inference.classify", "inference.translate"]
    if request.keys() & {"query", "text_1"}:
        return ["inference.rerank", "inference.score"]
    return ["inference.generate"]


_TASK_IDS: Final = (
    st.builds(lambda: str(uuid4())) | st.text(min_size=1, max_size=9) | st.just("mill-\ud800")
)


@st.composite
def items(draw: st.DrawFn) -> bytes:
    """One list item, spoiled in one place or in none; JSON as Python writes it, NaN included."""
    places = ("task", "id", "args", "kwargs", "embed", "body", "content-type", "content-encoding")
    spoilt = draw(
        st.none()
        | st.sampled_from([*places, "headers", "properties", *_OPTIONS, "tag", "delivery_info"])
    )

    def put(place: str, good: Any) -> Any:
        return draw(ANYTHING) if place == spoilt else good

    request = draw(requests())
    task = draw(st.sampled_from(_tasks(request)))
    named = {"task": put("task", task), "id": put("id", draw(_TASK_IDS))}
    options = draw(st.fixed_dictionaries({}, optional=_OPTIONS))
    options |= {spoilt: draw(ANYTHING)} if spoilt in _OPTIONS else {}
    args, kwargs, embed = put("args", []), put("kwargs", request), put("embed", {})
    if draw(st.booleans()):
        headers: Any = {"lang": "py", **named, **options}
        body: Any = [args, kwargs, embed]
    else:  # protocol 1
        headers = draw(st.sampled_from([{}, None]))
        body = {**named, **options, "args": args, "kwargs": kwargs}
    text = json.dumps(put("body", body))
    is_plain = draw(st.booleans())
    properties = {
        "delivery_tag": put("tag", str(uuid4())),
        "delivery_info": put("delivery_info", {"exchange": "", "routing_key": "celery"}),
        "priority": draw(st.integers(0, 9) | WITHOUT_END | ANYTHING),
        **({} if is_plain else {"body_encoding": "base64"}),
    }
    envelope = {
        "body": text if is_plain else base64.b64encode(text.encode()).decode(),
        "content-type": put("content-type", "application/json"),
        "content-encoding": put("content-encoding", "utf-8"),
        "headers": put("headers", headers),
        "properties": put("properties", properties),
    }
    return json.dumps(envelope).encode()
