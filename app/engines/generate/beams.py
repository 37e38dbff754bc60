"""Answers by beam search, which is transformers' own: what it gives to each prompt alone.

A search keeps the likeliest beginnings of an answer side by side. Prompts of equal searches share a
batch; the n answers to a prompt are the n best ends of one search.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from app.books.shares import share
from app.engines.base import NOT_FINITE, Breakdown, Generation, Progress, Sequence, StepStats
from app.engines.checkpoint.generation_config import GenerationRules
from app.engines.generate.search import Search
from app.engines.shares import shares_of
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import Tokenizer
from app.jobs import FinishReason, SamplingParams

Generate = Callable[..., Any]
"""Of prompts, and how: what transformers' `generate` gives."""


class BeamRows:
    """The prompts of a running search, its steps, and who of them is over before its end."""

    def __init__(
        self,
        search: Search,
        sequences: Seq[Sequence],
        tokenizer: Tokenizer,
        cancelled: set[int],
        progress: Progress,
    ) -> None:
        self._search = search
        self._tokenizer = tokenizer
        self._cancelled = cancelled
        self._progress = progress
        self._stamps = [time.monotonic_ns()]  # of the start, then of the end of each step
        by_question: dict[Any, _Row] = {}
        for each in sequences:
            assert each.params
            row = by_question.setdefault(question(each), _Row(each.prompt_token_ids, each.params))
            row.sequences.append(each)
        self._rows = list(by_question.values())

    def run(
        self, generate: Generate, config: GenerationConfig, stats: StepStats
    ) -> list[Generation]:
        """`config` is that of `search_config`."""
        most = 1 + max(
            each.params.beam for row in self._rows for each in row.sequences if each.params
        )
        found = generate(
            [row.prompt for row in self._rows],
            [row.params for row in self._rows],
            generation_config=config,
            num_return_sequences=most,
            logits_processor=LogitsProcessorList(
                [_Begin([row.params.forced_bos_token_id for row in self._rows]), _Finite(self)]
            ),
            stopping_criteria=StoppingCriteriaList([_Over(self)]),
        )
        self._stamps[-1] = time.monotonic_ns()  # the last step ends with the batch
        lengths = (found.beam_indices >= 0).sum(-1)
        begin = found.sequences.shape[1] - found.beam_indices.shape[1]
        answers = [
            ids[begin : begin + length]
            for ids, length in zip(found.sequences.tolist(), lengths.tolist(), strict=True)
        ]
        for place, row in enumerate(self._rows):
            row.answers = answers[place * most : (place + 1) * most]
        return self._generations(stats)

    def stopped(self, logits: Tensor | None = None) -> list[bool]:
        """Which prompts' searches are over, for they were cancelled or failed."""
        if logits is not None:
            bad = (logits.isnan() | (logits == float("inf"))).any(-1)
            for row, is_bad in zip(self._rows, bad.view(len(self._rows), -1).any(-1), strict=True):
                row.is_bad = row.is_bad or bool(is_bad)
        return [
            row.is_bad or all(each.id in self._cancelled for each in row.sequences)
            for row in self._rows
        ]

    def took_step(self) -> None:
        self._stamps.append(time.monotonic_ns())
        self._progress()

    def _generations(self, stats: StepStats) -> list[Generation]:
        """The answers, with what was computed counted and its time shared out."""
        lengths = [len(row.prompt) for row in self._rows]
        steps = [max(map(len, row.answers)) for row in self._rows]
        stats.useful_tokens += sum(lengths)
        stats.padded_tokens += len(lengths) * max(lengths)
        stats.padded_tokens += len(lengths) * self._search.num_beams * (len(self._stamps) - 1)
        generations = []
        shares = shares_of(self._stamps, lengths, steps)
        for row, (prefill_ns, decode_ns) in zip(self._rows, shares, strict=True):
            equal = [1] * len(row.sequences)
            parts = zip(share(prefill_ns, equal), share(decode_ns, equal), strict=True)
            for sequence, (prefill, decode) in zip(row.sequences, parts, strict=True):
                answer = self._generation(row, sequence)
                answer.device_ns = prefill + decode
                answer.breakdown = Breakdown(prefill)
                stats.useful_tokens += len(answer.token_ids)
                generations.append(answer)
        return generations

    def _generation(self, row: _Row, sequence: Sequence) -> Generation:
        assert sequence.params
        output = Output(sequence.params, self._tokenizer, sequence.prompt_token_ids)
        reason: FinishReason | None = None
        for token in [] if row.is_bad else row.answers[sequence.params.beam]:
            reason = output.append(token)
        answer = Generation(
            sequence.id,
            FinishReason.CANCELLED if sequence.id in self._cancelled else reason or _ENDED,
            token_ids=output.token_ids,
            text=output.text,
            input_tokens=len(sequence.prompt_token_ids),
            started_ns=self._stamps[0],
            first_token_ns=self._stamps[1],
            finished_ns=self._stamps[-1],
        )
        if row.is_bad:
            answer.finish_reason = FinishReason.ERROR
            answer.error_code, answer.error_message = NOT_FINITE
        return answer


_ENDED: Final = FinishReason.STOP
"""Of an answer that the search took though it has neither its last token nor all it may have."""


@dataclass(slots=True, eq=False)
class _Row:
    """A prompt, and those who asked for one of its search's answers."""

    prompt: tuple[int, ...]
    params: SamplingParams  #: of any of them
    sequences: list[Sequence] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)  #: token ids, from the best on
    is_bad: bool = False  #: its scores were not finite


def question(sequence: Sequence) -> Any:
    """Equal for those who ask one search for its answers."""
    params = sequence.params
    assert params
    begin = params.decoder_start_token_id, params.forced_bos_token_id
    return sequence.prompt_token_ids, begin


def search_config(
    search: Search, rules: GenerationRules, plain: GenerationConfig, tokenizer: Tokenizer
) -> GenerationConfig:
    """How transformers is to search. `plain` says what the model's outputs start from."""
    words = [*rules.bad_words, *search.bad_words]
    asked = {
        "bos_token_id": plain.bos_token_id,
        "decoder_start_token_id": plain.decoder_start_token_id,
        "eos_token_id": sorted(tokenizer.eos_token_ids),
        "suppress_tokens": list(rules.suppress_tokens),
        "begin_suppress_tokens": list(rules.begin_suppress_tokens),
        "sequence_bias": [[list(ids), bias] for ids, bias in rules.sequence_bias],
        "bad_words_ids": [list(ids) for ids in words],
        "forced_bos_token_id": rules.forced_bos_token_id,
        "forced_eos_token_id": rules.forced_eos_token_id,
        "min_length": rules.min_length,
        "min_new_tokens": max(rules.min_new_tokens, search.min_tokens),
        "no_repeat_ngram_size": rules.no_repeat_ngram_size,
    }
    return GenerationConfig(  # type: ignore[no-untyped-call]
        **{name: value for name, value in asked.items() if value not in (None, [])},
        pad_token_id=plain.pad_token_id,
        repetition_penalty=search.repetition_penalty,
        num_beams=search.num_beams,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
        max_new_tokens=search.max_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )


class _Begin(LogitsProcessor):
    """Leaves each output's first token no choice, where it has none."""

    def __init__(self, token_ids: Seq[int | None]) -> None:
        self._token_ids: Seq[int | None] | None = token_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_ids, self._token_ids = self._token_ids, None
        beams = len(scores) // len(token_ids or scores)
        for place, token_id in enumerate(token_ids or ()):
            if token_id is not None:
                row = scores[place * beams : (place + 1) * beams]
                row.fill_(float("-inf"))
                row[:, token_id] = 0.0
        return scores


class _Finite(LogitsProcessor):
    """Keeps a row whose scores are not finite from spoiling the search of others."""

    def __init__(self, rows: BeamRows) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._rows.stopped(scores)
        return torch.nan_to_num(scores, nan=-1e9, posinf=-1e9, neginf=float("-inf"))


class _Over(StoppingCriteria):
    """Ends the searches of those who were cancelled, with what they have."""

    def __init__(self, rows: BeamRows) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._rows.took_step()
        over = torch.tensor(self._rows.stopped(), device=input_ids.device)
        return over.repeat_interleave(len(input_ids) // len(over))
