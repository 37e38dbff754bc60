"""JSON text is looked through before values are made of it."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.jobs import calls as jobs
from app.api.wire.raw_bodies import parse_json
from app.errors import RequestError
from app.requests import json_text
from app.requests.json_text import MAX_PARTS, end_of_part, items_of, refuse_crowded

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters() | st.sampled_from('"\\[]{},')),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@given(VALUES.filter(lambda it: isinstance(it, str | list | dict)), VALUES, st.booleans())
def test_a_part_ends_where_a_parser_says(part: Any, other: Any, ascii: bool) -> None:
    text = json.dumps(part, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    after = json.dumps([other, part]).encode()

    assert end_of_part(text, 0) == len(text)
    assert end_of_part(b" [" + text + b"," + after, 2) == 2 + len(text)


@given(st.binary(max_size=40) | st.text('"\\[]{},:a').map(str.encode))
def test_what_is_no_json_ends_somewhere(raw: bytes) -> None:
    assert 0 <= end_of_part(raw, 0) <= len(raw)


@pytest.mark.parametrize(
    "item", [b"[]", b'""', b'"a":{}', b"{}", b"[", b"{", b'"\\""', b'[1,{"a":"b"}]']
)
def test_a_body_crowded_with_parts_is_refused_before_values_are_made_of_it(
    item: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "app.api.wire.raw_bodies.from_json", lambda _: pytest.fail("Values were made.")
    )
    raw = b"[" + b",".join([item] * 200_000) + b"]"

    with pytest.raises(RequestError, match=f"more than {MAX_PARTS} texts, objects and lists"):
        parse_json(raw)


@pytest.mark.parametrize(
    "value",
    [
        {"body": {"prompt": [[1, 2]] * 2048}},
        {"body": {"messages": [{"role": "user", "content": "a", "name": "b"}] * 1000}},
        {"body": {"prompt": json.dumps([{"a": []}] * 100_000)}},  # data in a text is one text
        {"body": {"prompt": [1] * 900_000}},
    ],
)
def test_a_large_request_of_a_sane_client_is_not_crowded(value: Any) -> None:
    refuse_crowded(json.dumps(value).encode())


def test_parts_are_counted_to_the_last_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_PARTS", 4)

    refuse_crowded(b'{"a":[1,2,"b"]}')
    with pytest.raises(RequestError):
        refuse_crowded(b'{"a":[1,[],"b"]}')


# ── the items of a bulk ─────────────────────────────────────────────────────────────────────────


@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 1]))
def test_the_items_of_a_list_are_those_that_a_parser_makes(values: list[Any], indent: int) -> None:
    raw = bytearray(json.dumps({"jobs": values}, indent=indent).encode())

    items = items_of(raw, "jobs", 10)

    assert items is not None
    assert [json.loads(raw[item]) for item in items] == values


@given(
    st.lists(
        st.sampled_from(['{"jobs":[', "]}", '{"a":', '"', "\\", "[", "]", "{", "}", ",", " 1", ":"])
    )
)
def test_whatever_has_items_all_of_which_are_json_is_json_with_these_items(
    parts: list[str],
) -> None:
    raw = "".join(parts).encode()

    items = items_of(raw, "jobs", 10)

    if items is not None and all(map(is_json, (raw[item] for item in items))):
        assert json.loads(raw) == {"jobs": [json.loads(raw[item]) for item in items]}
    elif is_json(raw) and isinstance(json.loads(raw), dict):
        assert not isinstance(json.loads(raw).get("jobs"), list) or len(json.loads(raw)) > 1


def is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"jobs":[',
        b'{"jobs":[{}',
        b'{"jobs":[{}}]',
        b'{"jobs":[{}],"more":1}',
        b'{"jobs":[{}]} x',
        b'{"more":1,"jobs":[{}]}',
        b'{"jobs":{}}',
        b'{"jobs":[' + b"{}," * 10 + b"{}]}",
    ],
)
def test_what_is_no_object_of_one_list_has_no_items(raw: bytes) -> None:
    assert items_of(raw, "jobs", 10) is None


def test_one_job_too_crowded_ends_the_look_at_a_bulk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_PARTS", 4)

    assert items_of(b'{"jobs":[' + b"[[[[]]]]," * 5 + b"1]}", "jobs", 10)
    with pytest.raises(RequestError):
        items_of(b'{"jobs":[' + b"[[[[]]]]," * 5 + b"[[[[[]]]]]]}", "jobs", 10)


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=40))
def test_a_bulk_is_checked_in_pieces_that_keep_nobody_waiting(sizes: list[int]) -> None:
    ends = list(accumulate(size + 1 for size in sizes))
    items = [slice(end - size - 1, end - 1) for end, size in zip(ends, sizes, strict=True)]

    pieces = list(jobs.pieces_of(items))

    assert [item for piece in pieces for item in piece] == items
    for piece in pieces:
        assert len(piece) == 1 or piece[-1].stop - piece[0].start <= jobs.PIECE_BYTES
