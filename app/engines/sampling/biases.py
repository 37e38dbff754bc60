"""What is added to a row's logits besides penalties: by token, by position, by what came before.

The rules are those of the row's request and those of its model together, each as transformers'
`generate` and vLLM have it. A bias of minus infinity forbids a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import Final

from app.engines.checkpoint.generation_config import GenerationRules
from app.jobs import SamplingParams

FORBIDDEN: Final = float("-inf")
_FOREVER: Final = 2**62


class RowBiases:
    """The biases of one row. Positions count the row's output tokens."""

    def __init__(
        self,
        params: SamplingParams,
        rules: GenerationRules,
        eos_token_ids: Iterable[int],
        vocab_size: int,
        prompt: Seq[int],
        output: Seq[int],
    ) -> None:
        """`output` is read at each step, where a rule looks back: keep it up to date. `prompt` is
        what the decoder was given: of an encoder-decoder, one token."""
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        fixed = _fixed(params, rules, ends, len(prompt))
        self._fixed = [line for line in fixed if 0 <= line[0] < vocab_size]
        self._forced = dict(_forced(params, rules, len(prompt)))
        self._changes = sorted(
            {place for *_, first, until in self._fixed for place in (first, until)}
            | {place + later for place in self._forced for later in (0, 1)}
        )
        reading = reads(params, rules)
        self.past = _Past(params, rules, vocab_size, prompt, output) if reading else None

    def __bool__(self) -> bool:
        return bool(self._fixed or self._forced or self.past)

    def at(self, position: int) -> Iterator[tuple[int, float]]:
        """Tokens and what their logits are raised by at a position, but for what looks back."""
        return (
            (token, bias) for token, bias, first, until in self._fixed if first <= position < until
        )

    def forced(self, position: int) -> int | None:
        """The only token that may come there."""
        return self._forced.get(position)

    def change_after(self, position: int) -> int:
        """The next position at which something else holds; one beyond any output if there is
        none."""
        return next((each for each in self._changes if each > position), _FOREVER)


def reads(params: SamplingParams, rules: GenerationRules) -> bool:
    """Whether what may come follows from the row's own tokens, which the host has to know."""
    sequences = (*params.bad_words, *rules.bad_words, *(ids for ids, _ in rules.sequence_bias))
    return rules.no_repeat_ngram_size > 0 or any(len(each) > 1 for each in sequences)


def _sequences(
    params: SamplingParams, rules: GenerationRules
) -> Iterator[tuple[tuple[int, ...], float]]:
    for ids in (*params.bad_words, *rules.bad_words):
        yield ids, FORBIDDEN
    yield from rules.sequence_bias


def _fixed(
    params: SamplingParams, rules: GenerationRules, ends: Iterable[int], num_prompt: int
) -> Iterator[tuple[int, float, int, int]]:
    """Token, bias, and the positions at which it holds: from, until."""
    for token, bias in params.logit_bias:
        yield token, bias, 0, _FOREVER
    for ids, bias in _sequences(params, rules):
        if len(ids) == 1:
            yield ids[0], bias, 0, _FOREVER
    for token in rules.suppress_tokens:
        yield token, FORBIDDEN, 0, _FOREVER
    begin = int(num_prompt <= 1 and _first(params, rules) is not None)
    for token in rules.begin_suppress_tokens:
        yield token, FORBIDDEN, begin, begin + 1
    least = max(params.min_tokens, rules.min_new_tokens, rules.min_length - num_prompt)
    if least > 0:
        for token in ends:
            yield token, FORBIDDEN, 0, least


def _forced(
    params: SamplingParams, rules: GenerationRules, num_prompt: int
) -> Iterator[tuple[int, int]]:
    """Positions and the only token that may come there. A grammar says so itself."""
    if params.grammar is not None:
        return
    if (first := _first(params, rules)) is not None and num_prompt == 1:
        yield 0, first
    if rules.forced_eos_token_id is not None and not params.ignore_eos:
        yield params.max_tokens - 1, rules.forced_eos_token_id


def _first(params: SamplingParams, rules: GenerationRules) -> int | None:
    """The only token that may begin an output."""
    own = rules.forced_bos_token_id
    return own if params.forced_bos_token_id is None else params.forced_bos_token_id


class _Past:
    """What may not follow, or less likely, because of the tokens before it."""

    def __init__(
        self,
        params: SamplingParams,
        rules: GenerationRules,
        vocab_size: int,
        prompt: Seq[int],
        output: Seq[int],
    ) -> None:
        self._vocab_size = vocab_size
        self._output = output
        self._num_read = 0
        self._known = list(prompt)
        self._by_last: dict[int, list[tuple[list[int], int, float]]] = {}
        for ids, bias in _sequences(params, rules):
            if len(ids) > 1 and ids[-1] < vocab_size:
                entry = list(ids[:-1]), ids[-1], bias
                self._by_last.setdefault(ids[-2], []).append(entry)
        self._size = rules.no_repeat_ngram_size
        self._followed: dict[tuple[int, ...], list[int]] = {}
        self._remember(0)

    def biases(self) -> list[tuple[int, float]]:
        """For the next token."""
        before = len(self._known)
        self._known += self._output[self._num_read :]
        self._num_read = len(self._output)
        self._remember(before)
        known = self._known
        found = [
            (token, bias)
            for prefix, token, bias in self._by_last.get(known[-1], ())
            if known[-len(prefix) :] == prefix
        ]
        if self._size:
            prefix = tuple(known[len(known) - self._size + 1 :])
            found += [(token, FORBIDDEN) for token in self._followed.get(prefix, ())]
        return found

    def _remember(self, begin: int) -> None:
        """What followed each beginning of an n-gram, from the token at `begin` on."""
        if self._size:
            for place in range(max(begin, self._size - 1), len(self._known)):
                token = self._known[place]
                if token < self._vocab_size:
                    prefix = tuple(self._known[place - self._size + 1 : place])
                    self._followed.setdefault(prefix, []).append(token)
