"""A response as a stream: its events, numbered from 0. Pure.

    created queued in_progress ─▶ (item: added, its text in pieces, done) … ─▶ the end

Where a text is cut into pieces follows from the text alone, and a piece is told when the next one
has begun. So the events are a function of the response: those of one that is still being written
are a beginning of those of the whole, in whatever portions its text came, whoever tells them, and
whether they are told of tokens as they come or of the row, years later.
https://platform.openai.com/docs/api-reference/responses-streaming has their shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from app.requests.response_answer import text_part

Event = dict[str, Any]

_PIECE: Final = re.compile(
    r"\s{0,16}[0-9A-Za-z\u00c0-\u024f\u0370-\u052f]{1,16}|\s{1,16}|.", re.DOTALL
)
"""A word of letters of which there are many in one, with the blanks before it; or a sign."""
_TERMINAL: Final = {
    "completed": "response.completed",
    "failed": "response.failed",
    "incomplete": "response.incomplete",
    "cancelled": "response.incomplete",  # the API has no event of its own for it
}
LAST: Final = frozenset(_TERMINAL.values())
"""Types of the event that a stream ends with."""


def pieces(text: str, start: int, *, is_whole: bool) -> Iterator[str]:
    """A text from `start` on, where a piece ends: without the last one, unless it is whole."""
    while start < len(text):
        found = _PIECE.match(text, start)
        assert found is not None
        if found.end() == len(text) and not is_whole:
            return
        yield found[0]
        start = found.end()


class Narration:
    """Tells the events of one response, each once."""

    def __init__(self, shell: Mapping[str, Any]) -> None:
        """`shell` is the response without an answer."""
        self._shell = shell
        self._number = 0
        self._is_started = False
        self._items: list[Mapping[str, Any]] = []  #: that were told to their ends, as they were
        self._text: str | None = None  #: of the item that is open, as far as it was told
        self._open: Mapping[str, Any] = {}
        self.has_parted = False
        """Something else was told than is true now: nothing more is, until the end."""

    def queued(self) -> Iterator[Event]:
        """The first events, whatever has become of it since."""
        yield self._event("response.created", response=self._as("queued"))
        yield self._event("response.queued", response=self._as("queued"))

    def started(self) -> Iterator[Event]:
        """The next one, once."""
        if not self._is_started:
            self._is_started = True
            yield self._event("response.in_progress", response=self._as("in_progress"))

    def _as(self, status: str) -> dict[str, Any]:
        return dict(self._shell) | {"status": status}

    def so_far(self, items: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
        """What is new with these output items, of which the last one still grows."""
        yield from self.started()
        if not self.has_parted:
            yield from self._tell(items, is_whole=False)

    def end(self, response: Mapping[str, Any]) -> Iterator[Event]:
        """The rest of a response that has ended. What was told and is not true is said to be
        incomplete; the last event has the whole response."""
        yield from self.started()
        if not self.has_parted:
            yield from self._tell(response["output"], is_whole=True)
        if self._text is not None:
            yield from self._done(_as_told(self._open, self._text) | {"status": "incomplete"})
        yield self._event(_TERMINAL[response["status"]], response=response)

    def _tell(self, items: Sequence[Mapping[str, Any]], *, is_whole: bool) -> Iterator[Event]:
        told = len(self._items)
        if len(items) < told + (self._text is not None) or any(
            _text_of(before) != _text_of(now) or before["type"] != now["type"]
            for before, now in zip(self._items, items, strict=False)
        ):
            self.has_parted = True
            return
        for place, item in enumerate(items[told:], told):
            if self._text is None:
                yield from self._added(item)
            is_done = is_whole or place < len(items) - 1
            if item["type"] != self._open["type"] or not _text_of(item).startswith(
                self._text or ""
            ):
                self.has_parted = True
                return
            yield from self._grown(item, is_done=is_done)
            if not is_done:
                return
            yield from self._done(item)

    # ── one item ─────────────────────────────────────────────────────────────────────────────

    def _added(self, item: Mapping[str, Any]) -> Iterator[Event]:
        empty = _as_told(item, "") | {"status": "in_progress"}
        if "content" in empty:
            empty |= {"content": []}
        self._open, self._text = item, ""
        yield self._event("response.output_item.added", item=empty, output_index=self._place)
        if "content" in empty:
            part = _as_told(item, "")["content"][0]
            yield self._event("response.content_part.added", **self._part_of(item), part=part)

    def _grown(self, item: Mapping[str, Any], *, is_done: bool) -> Iterator[Event]:
        text, told = _text_of(item), self._text or ""
        name, aside = _DELTAS[item["type"]]
        for piece in pieces(text, len(told), is_whole=is_done):
            told += piece
            where = self._part_of(item) if "content" in item else self._item_of(item)
            yield self._event(f"response.{name}.delta", **where, delta=piece, **aside)
        self._open, self._text = item, told

    def _done(self, item: Mapping[str, Any]) -> Iterator[Event]:
        name, _ = _DELTAS[item["type"]]
        if "content" in item:
            [part] = item["content"]
            where = self._part_of(item)
            scores = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._event(f"response.{name}.done", **where, text=part["text"], **scores)
            yield self._event("response.content_part.done", **where, part=part)
        else:
            called = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event(f"response.{name}.done", **self._item_of(item), **called)
        yield self._event("response.output_item.done", item=item, output_index=self._place)
        self._items.append(item)
        self._text = None

    @property
    def _place(self) -> int:
        return len(self._items)

    def _item_of(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": self._place}

    def _part_of(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return self._item_of(item) | {"content_index": 0}

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}


_DELTAS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "message": ("output_text", {"logprobs": []}),
    "reasoning": ("reasoning_text", {}),
    "function_call": ("function_call_arguments", {}),
}
"""Names of the events of an item's text, and what else its pieces have."""


def _text_of(item: Mapping[str, Any]) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    return "".join(part["text"] for part in item["content"])


def _as_told(item: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The item with so much of its text."""
    match item["type"]:
        case "function_call":
            return dict(item) | {"arguments": text}
        case "message":
            return dict(item) | {"content": [text_part(text)]}
    return dict(item) | {"content": [{"type": "reasoning_text", "text": text}]}
