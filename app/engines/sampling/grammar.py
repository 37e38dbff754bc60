"""Outputs that must match a JSON schema or a regular expression, token by token.

llguidance does the matching: it compiles without a pass over the vocabulary, bounds every step by
its own limits, and never raises for what a grammar does. Compiling still takes from a millisecond
to a second, so it happens in threads beside the engine's loop:

    compiling = grammars.compile(grammar)  # at once
    matcher = compiling.matcher()          # None until it is ready; raises InvalidSchema
    matcher.fill(mask)                     # before each token: which ones may come
    is_whole = matcher.take(token_id)      # after it
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy as np
from llguidance import (
    LLMatcher,
    LLParserLimits,
    LLTokenizer,
    TokenizerWrapper,
    regex_to_lark,
)
from numpy.typing import NDArray

from app.engines.text.tokenizer import Tokenizer
from app.errors import InvalidSchema, RequestError
from app.jobs import Grammar

COMPILE_TIMEOUT_S: Final = 5.0
CACHE_SIZE: Final = 128  #: compiled grammars of one model
_THREADS: Final = 2

# A step that spends all of its fuel takes about a third of a second on one core; ordinary schemas
# need less than a hundredth of it. A state takes one to two kilobytes.
_LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    max_lexer_states=50_000,
    verbose_errors=False,  # they would quote the output
)

# One line, spaced as most of the JSON that models have read. Free whitespace would let a model
# write blanks without end.
JSON_STYLE: Final[Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
_ALL_ALLOWED: Final = -1
_START: Final = "start:"
_PRINTABLE: Final = range(ord(" "), ord("~") + 1)


class Matcher:
    """How far one output has come in its grammar."""

    def __init__(self, grammar: Grammar, compiled: LLMatcher, vocab_size: int) -> None:
        """`vocab_size` is the tokenizer's, which logits may be wider or narrower than."""
        self._grammar = grammar
        self._matcher = compiled.deep_copy()
        self._own = np.zeros(-(-vocab_size // 32), np.int32)

    def fill(self, mask: NDArray[np.int32]) -> None:
        """Write which tokens may come next: a bit each, the lowest first, for as many tokens as
        there is room for; none that the tokenizer does not know.

        If that is beyond the limits all bits are set, and `take` will say so.
        """
        own = self._own
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(own.ctypes.data, own.nbytes)
        if self._matcher.is_error():
            mask[:] = _ALL_ALLOWED
            return
        mask[: len(own)] = own[: len(mask)]
        mask[len(own) :] = 0

    def take(self, token_id: int) -> bool:
        """Go on by a token; whether the output is whole and nothing may follow.

        Raises `InvalidSchema` if the grammar turns out to be beyond the limits.
        """
        if not self._matcher.consume_token(token_id):
            raise _refusal(self._grammar, self._matcher.get_error())
        return self._matcher.is_stopped()


class Compiling:
    """A grammar that is compiled, or is about to be."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._began_ns = 0  # waiting for a thread does not count
        self.future: Future[tuple[LLMatcher, int]] = Future()  #: with its tokenizer's vocabulary

    def run(self, vocabulary: Vocabulary) -> None:
        self._began_ns = time.monotonic_ns()
        try:
            found = _compile(self._grammar, vocabulary)
            self.future.set_result((found, vocabulary.library.vocab_size))
        except Exception as error:
            self.future.set_exception(error)

    def matcher(self) -> Matcher | None:
        """A matcher at its beginning, or None while the grammar is being compiled.

        Raises `InvalidSchema` if it cannot be, or takes too long.
        """
        if self.future.done():
            return Matcher(self._grammar, *self.future.result())
        if self._began_ns and time.monotonic_ns() - self._began_ns > COMPILE_TIMEOUT_S * 1e9:
            raise _refusal(self._grammar, f"it takes over {COMPILE_TIMEOUT_S:g} seconds to compile")
        return None

    def wait(self) -> Matcher:
        """The same, once it is ready."""
        while (matcher := self.matcher()) is None:
            wait_any([self], 0.1)
        return matcher


def wait_any(compiling: list[Compiling], timeout_s: float) -> None:
    """Wait until one of them is ready."""
    wait_for([each.future for each in compiling], timeout_s, "FIRST_COMPLETED")


class Grammars:
    """Compiles for one model, each grammar once as long as it is among the last used."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: OrderedDict[Grammar, Compiling] = OrderedDict()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None

    def compile(self, grammar: Grammar) -> Compiling:
        """Begin to compile, or find what is compiled. For one thread."""
        compiling = self._cache.get(grammar)
        if compiling is None:
            compiling = self._cache[grammar] = Compiling(grammar)
            self._pool.submit(self._run, compiling)
        self._cache.move_to_end(grammar)
        if len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return compiling

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, compiling: Compiling) -> None:
        try:
            with self._lock:  # made for the first grammar: it takes half a second and some memory
                if self._vocabulary is None:
                    self._vocabulary = Vocabulary(self._tokenizer)
        except Exception:
            reason = "This model's tokenizer cannot be held to a schema or regular expression."
            compiling.future.set_exception(InvalidSchema(reason))
        else:
            compiling.run(self._vocabulary)


class Vocabulary:
    """A tokenizer as llguidance takes it, where a token's bytes are what it adds to a text: so what
    matches a grammar is the text itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes about a second, and meanwhile some memory."""
        if not tokenizer.is_context_free:
            raise ValueError("What a token adds to a text depends on the token before it.")
        ends = sorted(each for each in tokenizer.eos_token_ids if each < tokenizer.vocab_size)
        self._tokenizer = tokenizer
        # What the library looks at:
        self.eos_token_id = ends[0]
        self.bos_token_id = None
        self.special_token_ids = [*tokenizer.special]
        self.tokens = [_bytes(tokenizer, each) for each in range(tokenizer.vocab_size)]
        self.preamble = _preamble(tokenizer, set(self.tokens))
        with _panics_are_errors():
            self.library = LLTokenizer(TokenizerWrapper(self), eos_token=ends)
        self.tokens = []

    def __call__(self, text: str) -> list[int]:
        """The tokens in which a model would most likely write a text that is sure to come; the
        longest that there are, if its tokenizer does not say."""
        with suppress(RequestError):
            if token_ids := self._tokenizer.encode_within(text):
                return [*token_ids]
        return self.library.greedy_tokenize(text)


def _preamble(tokenizer: Tokenizer, pieces: set[bytes]) -> str:
    """What a grammar for this vocabulary begins with."""
    # Where only one text can come the library takes it for granted that there are tokens for it.
    is_complete = all(bytes([code]) in pieces for code in _PRINTABLE)
    forcing = "" if is_complete else '%llguidance {"no_forcing": true}\n'
    # The blank at the very beginning is the vocabulary's, and not in the text.
    blank = ' " "' if tokenizer.separate_output and tokenizer.drops_blank else ""
    return f"{forcing}{_START}{blank}"


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    special = tokenizer.special.get(token_id)
    return tokenizer.token_bytes(token_id, token_id) if special is None else special.encode()


def check(grammar: Grammar) -> None:
    """Raise `InvalidSchema` for what can be seen to be wrong without a model, in milliseconds."""
    if reason := _problem(grammar):
        raise _refusal(grammar, reason)


@functools.lru_cache(maxsize=CACHE_SIZE)
def _problem(grammar: Grammar) -> str:
    try:
        with _panics_are_errors():
            return LLMatcher.validate_grammar(_source(grammar), limits=_LIMITS)
    except ValueError as error:
        return str(error)


def _compile(grammar: Grammar, vocabulary: Vocabulary) -> LLMatcher:
    try:
        with _panics_are_errors():
            source = _source(grammar, vocabulary.preamble)
            matcher = LLMatcher(vocabulary.library, source, log_level=0, limits=_LIMITS)
            if not matcher.is_error():
                matcher.compute_bitmask()  # takes longest, and finds out if nothing can match
    except ValueError as error:
        raise _refusal(grammar, str(error)) from None
    if matcher.is_error():
        raise _refusal(grammar, matcher.get_error())
    return matcher


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """A bug in the library, which is no `Exception`, becomes a `ValueError`: it is for this grammar
    alone."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError("the library that reads it failed") from None


def lark_of(grammar: Grammar) -> str:
    """The expression that a schema or regular expression is in a larger grammar."""
    if grammar.kind == "regex":
        return f"/{regex_to_lark(grammar.text, use_ascii='dw')}/"
    return f"%json {json.dumps(json.loads(grammar.text) | {'x-guidance': JSON_STYLE})}"


def _source(grammar: Grammar, preamble: str = _START) -> str:
    """In llguidance's own notation."""
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(f"{preamble} {grammar.text}")
    if grammar.kind == "regex":
        # \d and \w as in JSON schemas: a date has no Tibetan digits.
        pattern = regex_to_lark(grammar.text, use_ascii="dw")
        return LLMatcher.grammar_from_lark(f"{preamble} /{pattern}/")
    source = LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_STYLE)
    if preamble == _START:
        return source
    whole = json.loads(source)
    begin = {"name": "begin", "lark_grammar": f"{preamble} @{whole['grammars'][0]['name']}"}
    return json.dumps({**whole, "grammars": [begin, *whole["grammars"]]})


def _refusal(grammar: Grammar, reason: str) -> InvalidSchema:
    """The library's reason in one line; what it shows of a regular expression is left out."""
    lines = reason.splitlines() or [""]
    told = next((line for line in lines if line.startswith("error: ")), lines[0])
    told = told.removeprefix("error: ").strip()[:200].rstrip(".")
    if told.startswith("NoExtension"):
        told = "nothing can match it"
    return InvalidSchema(f"The {_NAMES[grammar.kind]} cannot be used: {told}.")


_NAMES: Final = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "lark": "tools' or the answer's schema",
}
