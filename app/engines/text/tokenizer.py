"""Text to token ids and back.

The API counts tokens before a job is queued, so this module must stay light: it uses the
`tokenizers` library and Jinja directly, and never imports torch or transformers (which would cost
each process a few hundred megabytes and seconds of start-up).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

from tokenizers.decoders import ByteLevel

from app.config.settings import ModelSettings
from app.engines import registry
from app.engines.checkpoint.context import context_tokens
from app.engines.checkpoint.json_files import read_json
from app.engines.checkpoint.languages import (
    NO_LANGUAGES,
    AnyLanguages,
    Direction,
    Languages,
    find_languages,
)
from app.engines.text import tokenizer_file
from app.engines.text.chat_template import Chat, ChatTemplate, find_template
from app.engines.text.pieces import Pieces
from app.engines.text.special_tokens import SpecialTokens
from app.errors import ConfigError, RequestError
from app.printable import in_a_line

SHORT: Final = 65_536
"""A text that is no longer is always turned into tokens: that takes milliseconds. Where whitespace
is dropped, or a word of any length is one unknown token, the length says little of a short text."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text, or a pair of them, in tokens."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...] = ()  #: which of the pair each token is of; () is all 0


class Tokenizer(abc.ABC):
    """The tokens of one model. Safe to use from several threads."""

    vocab_size: int  #: token ids run from 0 to below this
    context_tokens: int  #: prompt and output together; each alone for an encoder-decoder
    separate_output: bool = False  #: an encoder-decoder, whose output has a context of its own
    eos_token_ids: frozenset[int]  #: each of these ends an output
    template: ChatTemplate | None = None
    languages: Languages = NO_LANGUAGES  #: that the model translates between
    special: Mapping[int, str]  #: tokens that are no part of a text, and how they are written
    is_context_free: bool = True  #: a token within a text is the same bytes wherever it is
    drops_blank: bool = False  #: a text begins with a blank that is the vocabulary's, not its own
    longest_token: int  #: as `length` counts
    length_unit: Literal["bytes", "characters"]  #: of what the vocabulary is made

    @property
    def max_length(self) -> int:
        """A longer text cannot fit the context, as far as its length can tell: even one of the
        longest tokens alone would not."""
        return max(SHORT, self.context_tokens * self.longest_token)

    def length(self, text: str) -> int:
        """In bytes of UTF-8 or in characters, whichever tokens are made of."""
        return len(text.encode()) if self.length_unit == "bytes" else len(text)

    def check(self, token_ids: Seq[int], param: str | None = None) -> None:
        """Refuse ids that the model has no token for: they would end in an index error deep in it,
        and on CUDA poison the device."""
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.vocab_size):
            raise RequestError(
                f"A token id is out of range; this model's run to {self.vocab_size - 1}.",
                param=param,
            )

    @abc.abstractmethod
    def encode_text(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
        """With the special tokens that the model expects around a text, and none within it unless
        `parse_special` says that they are meant."""

    def encode(
        self,
        text: str,
        pair: str | None = None,
        *,
        parse_special: bool = False,
        max_tokens: int | None = None,
        max_pair_tokens: int | None = None,
    ) -> Encoded:
        """A text, or two as a pair, with all that the model expects around and between them.

        Beyond `max_tokens` the text is cut, of a pair the longer one first, and what is around them
        stays; the second alone is cut to `max_pair_tokens` before. Raises `RequestError` if nothing
        of the text would be left, or the model takes no pairs.
        """
        if pair is not None:
            raise RequestError("This model takes no pairs of texts.")
        return Encoded(self.encode_text(text, parse_special=parse_special)[:max_tokens])

    def encode_bare(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
        """A text without the special tokens around it."""
        return self.encode_text(text, parse_special=parse_special)

    def encode_source(
        self, text: str, direction: Direction, *, parse_special: bool = False
    ) -> tuple[int, ...]:
        """A text that is to be translated."""
        if direction.around is None:
            return self.encode_text(direction.prefix + text, parse_special=parse_special)
        before, behind = direction.around
        return (*before, *self.encode_bare(text, parse_special=parse_special), *behind)

    @abc.abstractmethod
    def encode_chat(self, chat: Chat, *, parse_special: bool = False) -> tuple[int, ...]:
        """A conversation through the model's chat template, up to where the assistant is to go on.
        What users wrote becomes no special token unless `parse_special`.

        Raises `RequestError` if the model has no template or the template refuses the messages.
        """

    @abc.abstractmethod
    def encode_within(self, text: str) -> tuple[int, ...]:
        """A stretch of a longer text, as a model most likely writes it, without special tokens;
        none if the vocabulary cannot write it so."""

    @abc.abstractmethod
    def decode(self, token_ids: Seq[int], *, skip_special_tokens: bool = True) -> str: ...

    @abc.abstractmethod
    def token_bytes(self, token_id: int, before: int | None) -> bytes:
        """What a token adds to a text behind the token `before`, None at the text's beginning:
        UTF-8, or a part of a character. Nothing for special tokens and ids without a token."""


_LEADS: Final = ("\n", "\2", ".")
"""With which hardly any token goes on."""


class FileTokenizer(Tokenizer):
    """The tokenizer.json and chat template of a model's folder."""

    def __init__(self, folder: Path, settings: ModelSettings) -> None:
        config = read_json(folder / "config.json")
        text_config = config.get("text_config", config)
        texts = read_json(folder / "tokenizer_config.json")
        self._file, self._special_texts = tokenizer_file.load(folder)
        self._cut_side = "left" if texts.get("truncation_side") == "left" else "right"
        self.template = find_template(folder, texts, self._special_texts)
        self.vocab_size = int(text_config.get("vocab_size") or self._file.get_vocab_size())
        self.separate_output = bool(config.get("is_encoder_decoder"))
        self.context_tokens = context_tokens(folder, text_config, texts, settings)
        self._pieces = Pieces(self._file)
        self.is_context_free = self._pieces.are_context_free
        self.drops_blank = self._pieces.drops_blank
        self.eos_token_ids = self._eos_token_ids(folder, text_config)
        self.special = self._special_tokens()
        self._special = SpecialTokens(
            self._file,
            self.template.source if self.template else "",
            self._named(),
            self.context_tokens,
        )
        if self.separate_output:
            eos = self._file.token_to_id(self._special_texts.get("eos_token", ""))
            self.languages = find_languages(folder, self._file.get_vocab(), eos)
        self.length_unit = "bytes" if isinstance(self._file.decoder, ByteLevel) else "characters"
        added = self._file.get_added_tokens_decoder().values()
        self.longest_token = max(
            *map(len, self._file.get_vocab(with_added_tokens=False)),  # of bytes: a character each
            *(self.length(each.content) for each in added),
        )

    def encode_text(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
        encoding = self._special.whole(text) if parse_special else self._special.encode(text)
        return tuple(self._file.post_process(encoding, None, True).ids)

    def encode_bare(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
        encoding = self._special.whole(text) if parse_special else self._special.encode(text)
        return tuple(encoding.ids)

    def encode(
        self,
        text: str,
        pair: str | None = None,
        *,
        parse_special: bool = False,
        max_tokens: int | None = None,
        max_pair_tokens: int | None = None,
    ) -> Encoded:
        encode = self._special.whole if parse_special else self._special.encode
        if max_tokens is not None:  # no work is done for what is cut anyway
            text, pair = self._start(text), None if pair is None else self._start(pair)
        first, second = encode(text), None if pair is None else encode(pair)
        if second is not None and max_pair_tokens is not None:
            second.truncate(max_pair_tokens, direction=self._cut_side)
        if max_tokens is not None:
            room = max_tokens - self._file.num_special_tokens_to_add(second is not None)
            if room < (1 if second is None else 2):
                raise RequestError(
                    f"{max_tokens} tokens leave no room for a text.", param="truncate_prompt_tokens"
                )
            most, most_second = _room(len(first), len(second or ()), room)
            first.truncate(most, direction=self._cut_side)
            if second is not None:
                second.truncate(most_second, direction=self._cut_side)
        done = self._file.post_process(first, second, True)
        return Encoded(tuple(done.ids), tuple(done.type_ids) if any(done.type_ids) else ())

    def _start(self, text: str) -> str:
        return text[-self.max_length :] if self._cut_side == "left" else text[: self.max_length]

    def encode_chat(self, chat: Chat, *, parse_special: bool = False) -> tuple[int, ...]:
        template = self.template
        if template is None:
            raise RequestError(
                "This model has no chat template; send a prompt instead.", param="messages"
            )
        # The template writes the special tokens itself.
        if parse_special:
            return tuple(self._special.whole(template.render(chat)).ids)
        texts = list(chat.texts())
        return tuple(
            self._special.encode_chat(texts, lambda put: template.render(chat.with_texts(put))).ids
        )

    def encode_within(self, text: str) -> tuple[int, ...]:
        wanted = text.encode()
        # A vocabulary may put a blank before a text: it is asked with something else before it.
        for whole in (text, text.removeprefix(" "), *(f"{lead}{text}" for lead in _LEADS)):
            token_ids, joined = self.encode_bare(whole), b""
            for place in range(len(token_ids) - 1, -1, -1):
                before = token_ids[place - 1] if place else token_ids[place]
                joined = self.token_bytes(token_ids[place], before) + joined
                if joined == wanted:
                    return token_ids[place:]
                if not wanted.endswith(joined):
                    break
        return ()

    def decode(self, token_ids: Seq[int], *, skip_special_tokens: bool = True) -> str:
        return self._file.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int, before: int | None) -> bytes:
        return b"" if token_id in self.special else self._pieces.of(token_id, before)

    def _eos_token_ids(self, folder: Path, config: dict[str, Any]) -> frozenset[int]:
        """What generation_config.json, or else config.json, says ends an output; what the tokenizer
        says; and what the chat template ends an answer with."""
        ends: set[int | None] = set()
        for source in (read_json(folder / "generation_config.json"), config):
            match source.get("eos_token_id"):
                case int(token):
                    ends = {token}
                    break
                case [*tokens] if tokens:
                    ends = {*tokens}
                    break
        ends |= {self._file.token_to_id(self._special_texts.get("eos_token", "")), self._turn_end()}
        return frozenset(each for each in ends if each is not None)

    def _turn_end(self) -> int | None:
        """The token that the chat template writes behind what an assistant has said."""
        said = "quern"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
        try:
            text = self.template.render(Chat(messages, ending="closed")) if self.template else ""
        except RequestError:  # it takes no such messages
            return None
        _, found, behind = text.rpartition(said)
        added = self._file.get_added_tokens_decoder().items()
        ends = (each for each in added if found and behind.lstrip().startswith(each[1].content))
        return max(ends, key=lambda each: len(each[1].content), default=(None,))[0]

    def _special_tokens(self) -> dict[int, str]:
        """What the file, the other files or the end of an output make special."""
        added = self._file.get_added_tokens_decoder().items()
        ids = {token_id for token_id, token in added if token.special} | self.eos_token_ids
        ids |= {known for it in self._named() if (known := self._file.token_to_id(it)) is not None}
        return {token_id: self._file.id_to_token(token_id) or "" for token_id in ids}

    def _named(self) -> list[str]:
        """Special tokens by the other files. A single letter, as the "!" that some pad with, is
        text all the same."""
        return [text for text in self._special_texts.values() if len(text) > 1]


class StubTokenizer(Tokenizer):
    """One token a byte of UTF-8, for the stub engine."""

    EOS: Final = 256

    def __init__(self, settings: ModelSettings) -> None:
        self.vocab_size = self.EOS + 1
        self.context_tokens = settings.context_tokens or 8192
        self.eos_token_ids = frozenset({self.EOS})
        self.special = {self.EOS: "<eos>"}
        self.languages = AnyLanguages()
        self.longest_token, self.length_unit = 1, "bytes"

    def encode_text(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
        return tuple(text.encode())  # no text is a special token here

    def encode(
        self,
        text: str,
        pair: str | None = None,
        *,
        parse_special: bool = False,
        max_tokens: int | None = None,
        max_pair_tokens: int | None = None,
    ) -> Encoded:
        if pair is None:
            return Encoded(self.encode_text(text)[:max_tokens])
        first, second = self.encode_text(f"{text}\n"), self.encode_text(pair)[:max_pair_tokens]
        ids = (first + second)[:max_tokens]
        return Encoded(ids, tuple(int(place >= len(first)) for place in range(len(ids))))

    def encode_chat(self, chat: Chat, *, parse_special: bool = False) -> tuple[int, ...]:
        return self.encode_text("\n".join(each["content"] or "" for each in chat.messages))

    def encode_within(self, text: str) -> tuple[int, ...]:
        return self.encode_text(text)

    def decode(self, token_ids: Seq[int], *, skip_special_tokens: bool = True) -> str:
        text = bytes(token for token in token_ids if token < self.EOS).decode(errors="replace")
        return text if skip_special_tokens else text + "<eos>" * list(token_ids).count(self.EOS)

    def token_bytes(self, token_id: int, before: int | None) -> bytes:
        return bytes((token_id,)) if token_id < self.EOS else b""


def stub_tokenizer(folder: Path, settings: ModelSettings) -> Tokenizer:
    return StubTokenizer(settings)


def load_tokenizer(folder: Path, settings: ModelSettings) -> Tokenizer:
    """The tokenizer of a model that `app.engines.checkpoint.models.ensure_files` made ready.

    Raises `ConfigError` if its files are wrong or `context_tokens` is beyond the model.
    """
    make = registry.attribute(registry.find(settings.engine).tokenizer)
    try:
        return cast(Tokenizer, make(folder, settings))
    except ConfigError:
        raise
    except Exception as error:  # files that hold anything, read by libraries
        raise ConfigError(
            f"the tokenizer in {folder} cannot be used: {in_a_line(error)}."
        ) from error


def _room(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens to keep of two texts: the longer is cut first, then both (`longest_first`, as
    transformers names it)."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)
