"""What counts the prompts of an upstream: the model's own tokenizer, or, where none is here, text
itself, three bytes a token.

Engines take token ids. Where the upstream's tokenizer is not to be had (a paid API, a server that
takes chats alone) these are the text, packed, and are unpacked before they are sent: nothing is
lost, and only what counts them is an estimate, mostly on the high side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Final

from app.config.settings import ModelSettings
from app.engines.openai.options import NO_FILES
from app.engines.text.chat_template import Chat
from app.engines.text.tokenizer import FileTokenizer, Tokenizer
from app.errors import RequestError

BYTES: Final = 3  #: of UTF-8 in a token
TEXT: Final = 0  #: the first token of a text
CHAT: Final = 1  #: the first token of a chat


def load(folder: Path, settings: ModelSettings) -> Tokenizer:
    if settings.source == NO_FILES:
        return TextTokenizer(settings)
    return FileTokenizer(folder, settings)


class TextTokenizer(Tokenizer):
    """Packs texts, and chats as JSON."""

    def __init__(self, settings: ModelSettings) -> None:
        self.vocab_size = 2 << 8 * BYTES
        self.context_tokens = settings.context_tokens or 0
        self.eos_token_ids = frozenset()
        self.special = {}
        self.longest_token, self.length_unit = BYTES, "bytes"

    def encode_text(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
        return (TEXT, *_packed(text))

    def encode_chat(self, chat: Chat, *, parse_special: bool = False) -> tuple[int, ...]:
        if chat.ending == "closed":
            raise RequestError("This model's server always answers a chat.", param="messages")
        body: dict[str, Any] = {"messages": list(chat.messages)}
        if chat.tools:
            body["tools"] = list(chat.tools)
        if chat.variables:
            body["chat_template_kwargs"] = dict(chat.variables)
        return (CHAT, *_packed(json.dumps(body, ensure_ascii=False)))

    def encode_within(self, text: str) -> tuple[int, ...]:
        return (*_packed(text),)

    def decode(self, token_ids: Seq[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(map(_bytes, token_ids)).decode(errors="replace")

    def token_bytes(self, token_id: int, before: int | None) -> bytes:
        return _bytes(token_id)


def unpacked(token_ids: Seq[int]) -> str | dict[str, Any]:
    """The text, or the fields of the chat. Raises `RequestError` for ids that are neither."""
    try:
        kind, text = token_ids[0], b"".join(map(_bytes, token_ids[1:])).decode()
        if kind == TEXT:
            return text
        if kind == CHAT and isinstance(chat := json.loads(text), dict):
            return chat
    except (ValueError, IndexError, OverflowError):
        pass
    raise RequestError("This model takes texts and chats, not token ids.")


def _packed(text: str) -> list[int]:
    data = text.encode()
    pieces = (data[begin : begin + BYTES] for begin in range(0, len(data), BYTES))
    return [int.from_bytes(b"\1" + piece) for piece in pieces]


def _bytes(token_id: int) -> bytes:
    """Nothing for a token that is none of a text."""
    return token_id.to_bytes(BYTES + 1).lstrip(b"\0")[1:]
