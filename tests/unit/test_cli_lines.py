"""Lines of files and pipes, whatever is in them."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cli import lines
from app.cli.lines import json_object, numbered_lines
from gristmill_client.errors import RequestError, RequestTooLarge


class InPieces(io.BytesIO):
    """Comes in pieces of some sizes, as from a pipe."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        super().__init__(data)
        self._sizes = sizes

    def read1(self, size: int | None = -1, /) -> bytes:
        return super().read1(self._sizes.pop() if self._sizes else size)


@given(
    st.lists(st.sampled_from([b"", b" ", b"\r", b"{}", b"x\r", b"\xef\xbb\xbf{}", b"\xff"])),
    st.booleans(),
    st.lists(st.integers(1, 9)),
)
def test_every_line_that_is_not_blank_comes_whole_with_its_number(
    given_: list[bytes], ends_with_a_newline: bool, sizes: list[int]
) -> None:
    data = b"\n".join(given_) + (b"\n" if ends_with_a_newline and given_ else b"")

    found = [each for each in numbered_lines(InPieces(data, sizes)) if each]

    bom = b"\xef\xbb\xbf"
    wanted = [
        (number, line.removeprefix(bom) if number == 1 else line)
        for number, line in enumerate(given_, 1)
        if line.strip()
    ]
    assert found == wanted


def test_no_more_is_kept_of_a_line_than_an_api_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    data = b'{"a": 1}\n' + b"x" * 1_000 + b'\n{"b": 2}'

    first, long, last = [each[1] for each in numbered_lines(InPieces(data, [7] * 100)) if each]

    assert (json_object(first), json_object(last)) == ({"a": 1}, {"b": 2})
    assert len(long) == 11
    with pytest.raises(RequestTooLarge, match="longer than 10 bytes"):
        json_object(long)


@given(st.binary())
def test_a_line_that_is_no_object_is_refused_without_being_quoted(line: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        json_object(b"secret" + line)

    assert "secret" not in str(refused.value)


@given(st.dictionaries(st.text(), st.one_of(st.none(), st.integers(), st.text())))
def test_an_object_is_read_as_it_was_written(value: dict[str, object]) -> None:
    assert json_object(json.dumps(value).encode()) == value
