"""Keeps a model's special tokens for those who may write them: its chat template, and we.

A library finds `<|im_end|>` in any text, so that a user who writes it would end his own turn and
begin another's. Here such text is cut in two within the marker, and the parts are turned into
tokens apart: the model reads the same characters, and none of them is a special token.

A text in which nothing has to be cut becomes the tokens that the library gives it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import count, pairwise
from typing import Final, NoReturn

from tokenizers import Encoding
from tokenizers import Tokenizer as TokenizerFile

from app.errors import RequestError

_SPAN: Final = re.compile(r"</?\w+>")
"""As `<think>`: marks a stretch of a turn, and no turn. Templates look for it in contents."""

_PRIVATE: Final = 0xF0000
"""From here on characters have no meaning."""

Render = Callable[[Callable[[str], str]], str]
"""The chat template's text, given what stands in the place of each text of users."""


class SpecialTokens:
    def __init__(
        self, file: TokenizerFile, template: str, named: Iterable[str], context_tokens: int
    ) -> None:
        """`named` are further texts of special tokens, by the model's other files. What has more
        tokens than the context is refused whatever they are, and left as the library gives it."""
        added = file.get_added_tokens_decoder().items()
        texts = {token_id: token.content for token_id, token in added if token.special}
        texts |= {
            token_id: token.content
            for token_id, token in added
            if token.content in template and not _SPAN.fullmatch(token.content)
        }
        texts |= {known: text for text in named if (known := file.token_to_id(text)) is not None}
        self._file = file
        self._context_tokens = context_tokens
        # What stands for any unknown character tells a model nothing that a user could not.
        self._unknown = _unknown(file)
        self._texts = {
            token_id: text.strip()
            for token_id, text in texts.items()
            if re.search(r"[^\w\s]", text)
        }
        self._ids = {text: token_id for token_id, text in self._texts.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._edges = frozenset(edge for text in self._ids for edge in (text[0], text[-1]))

    def encode(self, text: str) -> Encoding:
        """A text that is a user's alone, without what the model expects around it."""
        encoding = self.whole(text)
        if self._is_too_long(encoding) or not self._of(encoding):
            return encoding
        return self._cut(text, None)

    def encode_chat(self, contents: Sequence[str], render: Render) -> Encoding:
        """What a template makes of contents that are users'."""
        text = shadow = render(lambda content: content)
        encoding = self.whole(text)
        if self._is_too_long(encoding):
            return encoding
        if any(edge in content for edge in self._edges for content in contents):
            hidden = _StandIns(self._edges, [text, *contents])
            shadow = render(hidden.put)
            if hidden.taken_back(shadow) != text:
                return self._encode_heeded(render, hidden, shadow)
        if self._of(encoding) == self._written(shadow):
            return encoding
        return self._cut(text, shadow)

    def _encode_heeded(self, render: Render, hidden: _StandIns, neutral: str) -> Encoding:
        """The same for a template that goes by what contents say, as it does to leave out what an
        assistant thought: only whole markers are hidden from it."""
        shadow = render(lambda text: self._marker.sub(lambda it: hidden.put(it[0]), text))
        encoding = self._cut(hidden.taken_back(shadow), shadow)
        if self._of(encoding) != self._written(neutral):
            _refuse("what the chat template makes of it would have other turns than the messages")
        return encoding

    def whole(self, text: str) -> Encoding:
        """The text as the library takes it, special tokens and all."""
        # Of the library's calls only those for a batch let other threads go on meanwhile, and the
        # fast one keeps no offsets, which take most of the memory.
        [encoding] = self._file.encode_batch_fast([text], add_special_tokens=False)
        return encoding

    def _is_too_long(self, encoding: Encoding) -> bool:
        return len(encoding) > self._context_tokens

    def _of(self, encoding: Encoding) -> list[int]:
        return [each for each in encoding.ids if each in self._texts and each != self._unknown]

    def _written(self, shadow: str) -> list[int]:
        """The special tokens that the template itself has written."""
        found = (self._ids[each[0]] for each in self._marker.finditer(shadow))
        return [each for each in found if each != self._unknown]

    def _cut(self, text: str, shadow: str | None) -> Encoding:
        """`shadow` is the text with stand-ins for users' edges of markers; None: all is users'."""
        done: dict[int, Encoding] = {}
        todo = [(0, len(text))]
        while todo:
            pieces = [text[start:end] for start, end in todo]
            encodings = self._file.encode_batch(pieces, add_special_tokens=False)
            again: list[tuple[int, int]] = []
            for (start, end), encoding in zip(todo, encodings, strict=True):
                cuts = sorted({*self._cuts(encoding, text, shadow, start)})
                if cuts:
                    again += pairwise((start, *cuts, end))
                else:
                    done[start] = encoding
            todo = again
        return Encoding.merge([done[start] for start in sorted(done)])

    def _cuts(self, encoding: Encoding, text: str, shadow: str | None, start: int) -> Iterable[int]:
        """Places in the text behind the first character of each marker that is a user's."""
        for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id not in self._texts:
                continue
            span = slice(start + begin, start + end)
            marker = self._texts[token_id]
            is_written = text[span].strip() == marker  # else it became one by normalisation
            if token_id == self._unknown and not is_written:
                continue
            if shadow is not None and is_written and shadow[span].strip() == marker:
                continue
            cut = span.stop - len(text[span].lstrip()) + 1
            if cut >= span.stop:
                _refuse("a single character of it is a special token")
            yield cut


class _StandIns:
    """Characters without meaning in the place of others, one for one."""

    def __init__(self, hidden: Iterable[str], texts: Iterable[str]) -> None:
        taken = set().union(*texts)
        free = (chr(code) for code in count(_PRIVATE) if chr(code) not in taken)
        self._put = {
            ord(each): stand_in for each, stand_in in zip(sorted(hidden), free, strict=False)
        }
        self._back = {ord(stand_in): chr(each) for each, stand_in in self._put.items()}

    def put(self, text: str) -> str:
        return text.translate(self._put)

    def taken_back(self, text: str) -> str:
        return text.translate(self._back)


def _refuse(why: str) -> NoReturn:
    raise RequestError(
        f"What looks like special tokens of this model cannot be told from them here ({why}): "
        "leave it out, or set parse_special to mean it.",
        param="parse_special",
    )


def _unknown(file: TokenizerFile) -> int | None:
    """The token for a character that the vocabulary does not have, if there is one."""
    try:
        tokens = file.model.tokenize("\U0010fffd")
    except Exception:  # the library raises nothing more precise; the model has none
        return None
    return int(tokens[0].id) if len(tokens) == 1 else None
