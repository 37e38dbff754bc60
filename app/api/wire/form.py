"""A form with one file in it, as it arrives: the file is handed on piece by piece, never held.

RFC 7578 has the format. Fields are small and few, and may come before or behind the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import RequestError
from app.requests.part import printable
from app.requests.storable import refuse_unstorable

MAX_FIELDS: Final = 20
MAX_FIELD_BYTES: Final = 2_000
MAX_NAME: Final = 255
"""Characters of a file's name; of a longer one these are the last."""


class Form:
    """Owner of what has arrived: `fields`, and the `filename` once its part has begun."""

    def __init__(self, content_type: str) -> None:
        """Raises `RequestError` if it is no form."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise RequestError(
                "Send a form: Content-Type: multipart/form-data with its boundary.", param="body"
            )
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.is_whole = False
        self._pieces: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._header = [bytearray(), bytearray()]
        self._name = ""
        self._value: bytearray | None = None  #: None while the file's part arrives
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._headers.clear,
                "on_header_field": lambda data, start, end: self._head(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._head(1, data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_part,
                "on_part_data": lambda data, start, end: self._take(data[start:end]),
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What of the file is in this part of the body. Raises `RequestError`."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise RequestError("The form cannot be read.", param="body") from None
        pieces, self._pieces = self._pieces, []
        yield from pieces

    def finish(self) -> None:
        """The body has ended. Raises `RequestError` if the form has not, or has no file."""
        if not self.is_whole:
            raise RequestError("The form ends in the middle of a part.", param="body")
        if self.filename is None:
            raise RequestError("Missing required parameter: 'file'.", param="file")

    def _head(self, part: int, data: bytes) -> None:
        self._header[part] += data

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = [bytearray(), bytearray()]

    def _begin_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = options.get(b"name", b"").decode(errors="replace")
        filename = options.get(b"filename")
        if self._name != "file":
            self._value = bytearray()
            return
        if filename is None:
            raise RequestError("'file' must be a file, with its name.", param="file")
        if self.filename is not None:
            raise RequestError("The form has more than one file.", param="file")
        self._value = None
        self.filename = _plain(filename.decode(errors="replace"))

    def _take(self, data: bytes) -> None:
        if self._value is None:
            self._pieces.append(data)
            return
        self._value += data
        if len(self._value) > MAX_FIELD_BYTES:
            raise RequestError("A field of the form is too long.", param=printable(self._name))

    def _end_part(self) -> None:
        if self._value is None:
            return
        if len(self.fields) >= MAX_FIELDS:
            raise RequestError("The form has too many fields.", param="body")
        name = printable(self._name)
        if name in self.fields:
            raise RequestError(f"The field {name} is given twice.", param=name)
        value = self._value.decode(errors="replace")
        refuse_unstorable(value, name)
        self.fields[name] = value

    def _end(self) -> None:
        self.is_whole = True


def _plain(given: str) -> str:
    """The name without the folders that some clients send with it."""
    name = given.replace("\\", "/").rpartition("/")[2].strip()
    shown = "".join(each if each.isprintable() else "_" for each in name)
    return shown[-MAX_NAME:] or "file"
