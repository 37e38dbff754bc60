"""Static batches through transformers' own `generate`: any decoder or encoder-decoder.

A part of the batch, mostly all of it, is padded and runs until its last row is done. What may share
one is tried at load: nobody's tokens may depend on his company. Tokens are chosen row by row by our
sampler, in the place of a logits processor: it hands `generate` scores of which each row's token is
the only one left. So all of transformers' models and caches work, and each row has its own
parameters, length, stop strings and end.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence as Seq
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from app.config.settings import ModelSettings
from app.engines.base import (
    NOT_FINITE,
    Breakdown,
    Generation,
    Progress,
    Sequence,
    StepStats,
    TokenLogprob,
)
from app.engines.checkpoint.generation_config import BEAMS, GenerationRules, load_rules
from app.engines.checkpoint.loading import load_model
from app.engines.generate.beams import BeamRows, question, search_config
from app.engines.generate.company import AFFORDABLE, Company, Memory, Told, thresholds, try_company
from app.engines.generate.search import Search, search_of
from app.engines.sampling.grammar import Grammars, Matcher
from app.engines.sampling.sampler import BAD_ROW, RowSampler, Sampled
from app.engines.shares import shares_of
from app.engines.static import StaticEngine
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import Tokenizer, load_tokenizer
from app.errors import RequestError
from app.jobs import FinishReason, SamplingParams


class GenerateEngine(StaticEngine):
    def __init__(
        self, folder: Path, settings: ModelSettings, device: str, threads: int, progress: Progress
    ) -> None:
        super().__init__(load_tokenizer(folder, settings), settings, device, threads, progress)
        self._grammars = Grammars(self._tokenizer)
        self._matchers: dict[int, Matcher] = {}  #: by sequence, of the batch inside
        kind = AutoModelForSeq2SeqLM if self._tokenizer.separate_output else AutoModelForCausalLM
        self._model: Any = load_model(kind, folder, settings.dtype, self._device)
        self._rules = load_rules(folder, settings, obeyed=BEAMS)
        self._model.generation_config = _plain(self._model)
        self._memory = Memory(self._model)
        self._company = self._tried_company()
        self.kernels = f"torch, {self._company}"

    def _check(self, sequence: Sequence) -> None:
        if sequence.params is None:
            raise RequestError("This model generates text; it gives no embeddings.")
        if (
            search := search_of(sequence.params, self._rules)
        ) and search.num_beams > self._max_rows:
            raise RequestError(
                f"num_beams is at most this model's max_batch_size, {self._max_rows}.",
                param="num_beams",
            )
        if sequence.params.grammar:
            self._matchers[sequence.id] = self._grammars.compile(sequence.params.grammar).wait()

    def close(self) -> None:
        super().close()
        self._grammars.close()

    def _split(self, sequences: Seq[Sequence]) -> list[list[Sequence]]:
        """Parts, nearly always one, in which nobody changes another's tokens, that are searched for
        alike, and of which the longest prompt and output fit the context.

        `generate` goes on computing rows that are done, at places after their last; a short answer
        to a long prompt must not be carried beyond the context by a long answer to a short one.
        """
        parts: list[list[Sequence]] = []
        for _, alike in groupby(sorted(sequences, key=self._order), key=self._search):
            grown: list[Sequence] = []
            for sequence in alike:
                if grown and self._share([*grown, sequence]):
                    grown.append(sequence)
                else:
                    grown = [sequence]
                    parts.append(grown)
        return parts

    def _order(self, sequence: Sequence) -> tuple[str, int, tuple[int, ...]]:
        prompt = sequence.prompt_token_ids
        return str(self._search(sequence)), len(prompt), prompt

    def _search(self, sequence: Sequence) -> Search | None:
        """None also for what will be refused."""
        try:
            return search_of(sequence.params, self._rules) if sequence.params else None
        except RequestError:
            return None

    def _share(self, sequences: Seq[Sequence]) -> bool:
        lengths = [len(each.prompt_token_ids) for each in sequences]
        longest, output = max(lengths), _longest_output(sequences)
        span = max(longest, output) if self._tokenizer.separate_output else longest + output
        if search := self._search(sequences[0]):
            if len(set(map(question, sequences))) * search.num_beams > self._max_rows:
                return False
            if not self._tokenizer.separate_output and lengths[0] < longest:
                return False  # what the model says of an output's length counts the padding
        return span <= self._tokenizer.context_tokens and self._company.allows(lengths, span)

    def _run(self, sequences: Seq[Sequence], stats: StepStats) -> list[Generation]:
        if search := self._search(sequences[0]):
            rows = BeamRows(search, sequences, self._tokenizer, self._cancelled, self._progress)
            plain = self._model.generation_config
            config = search_config(search, self._rules, plain, self._tokenizer)
            return rows.run(self._generate, config, stats)
        matchers = [self._matchers.pop(each.id, None) for each in sequences]
        sequences = [
            dataclasses.replace(each, params=self._rules.merged(each.params))
            for each in sequences
            if each.params
        ]
        drawn = _Rows(
            sequences, matchers, self._tokenizer, self._rules, self._cancelled, self._progress
        )
        self._generate(
            [each.prompt_token_ids for each in sequences],
            [each.params for each in sequences],
            max_new_tokens=_longest_output(sequences),
            logits_processor=LogitsProcessorList([_Choose(drawn)]),
            stopping_criteria=StoppingCriteriaList([_Ended(drawn)]),
        )
        return drawn.answers(stats)

    def _generate(
        self, prompts: Seq[Seq[int]], params: Seq[SamplingParams | None] = (), **how: Any
    ) -> Any:
        """What transformers' `generate` gives; `params` say what each output starts from."""
        starts = [each.decoder_start_token_id if each else None for each in params]
        if any(start is not None for start in starts):
            own = self._model.generation_config.decoder_start_token_id
            how["decoder_start_token_id"] = [own if it is None else it for it in starts]
        self._memory.forget()
        return self._model.generate(**self._padded(prompts), **how)

    def _padded(self, prompts: Seq[Seq[int]]) -> dict[str, Tensor]:
        """Prompts side by side: a decoder goes on at the right, so its padding is on the left."""
        width = max(map(len, prompts))
        pad = self._model.generation_config.pad_token_id
        ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            left = 0 if self._tokenizer.separate_output else width - len(prompt)
            ids[row, left : left + len(prompt)] = torch.tensor(prompt)
            mask[row, left : left + len(prompt)] = 1
        return {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}

    def _tried_company(self) -> Company:
        """What a trial with this model on this device, in its own precision, says of company."""

        def scores(prompts: Seq[Seq[int]], steps: int) -> Tensor:
            told = Told()
            chosen = LogitsProcessorList([told])
            self._generate(prompts, max_new_tokens=steps, logits_processor=chosen)
            return torch.stack(told.scores, dim=1)

        tokenizer, model = self._tokenizer, self._model
        most = AFFORDABLE / model.num_parameters() if self._device.type == "cpu" else math.inf
        beyond = {
            each: each <= most
            for each in thresholds(model.config)
            if each < tokenizer.context_tokens
        }
        with torch.inference_mode():
            return try_company(
                scores, tokenizer.vocab_size, model.dtype, tokenizer.context_tokens, beyond
            )


class _Rows:
    """The rows of a running batch: what they have, who is done, and when."""

    def __init__(
        self,
        sequences: Seq[Sequence],
        matchers: Seq[Matcher | None],
        tokenizer: Tokenizer,
        rules: GenerationRules,
        cancelled: set[int],
        progress: Progress,
    ) -> None:
        self.is_done = [False] * len(sequences)
        self._sequences = sequences
        self._cancelled = cancelled
        self._progress = progress
        self._tokenizer = tokenizer
        self._rules = rules
        self._outputs = [
            Output(each.params, tokenizer, each.prompt_token_ids)
            for each in sequences
            if each.params
        ]
        for output, matcher in zip(self._outputs, matchers, strict=True):
            output.matcher = matcher
        self._answers = [
            Generation(
                each.id,
                FinishReason.LENGTH,
                input_tokens=len(each.prompt_token_ids),
            )
            for each in sequences
        ]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in sequences]
        self._steps = [0] * len(sequences)  # that each row was in
        self._stamps = [time.monotonic_ns()]  # of the start, then of the end of each step
        self._sampler: RowSampler | None = None  # made for the first logits: they tell its size

    def step(self, logits: Tensor, input_ids: Tensor) -> Tensor:
        """A token for each row, [rows]; 0 for those that are done. Waits for the device."""
        for row, sequence in enumerate(self._sequences):
            if sequence.id in self._cancelled and not self.is_done[row]:
                self._end(row, FinishReason.CANCELLED)
        chosen = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        live = [row for row, done in enumerate(self.is_done) if not done]
        if live:
            sampled = self._sample(logits, input_ids, live)
            self._take(live, sampled.tokens.tolist(), sampled.logprobs())
            chosen[live] = sampled.tokens.clamp(min=0)
        self._stamps.append(time.monotonic_ns())
        self._progress()
        return chosen

    def _sample(self, logits: Tensor, input_ids: Tensor, live: list[int]) -> Sampled:
        if self._sampler is None:
            self._sampler = self._filled(logits, input_ids)
        return self._sampler.sample(logits[live], self._sampler.plan(live))

    def _filled(self, logits: Tensor, input_ids: Tensor) -> RowSampler:
        """A sampler that knows what the decoder was given of each row."""
        ends, (num_rows, width) = self._tokenizer.eos_token_ids, logits.shape
        sampler = RowSampler(num_rows, width, logits.device, self._rules, ends)
        for row, sequence in enumerate(self._sequences):
            prompt: Seq[int] = sequence.prompt_token_ids
            if self._tokenizer.separate_output:
                prompt = input_ids[row].tolist()
            if sequence.params:
                output = self._outputs[row]
                sampler.put(row, sequence.params, prompt, output.token_ids, output.matcher)
        return sampler

    def _take(self, live: list[int], tokens: list[int], logprobs: dict[int, TokenLogprob]) -> None:
        for place, (row, token) in enumerate(zip(live, tokens, strict=True)):
            self._steps[row] += 1
            if token == BAD_ROW:
                self._end(row, FinishReason.ERROR, NOT_FINITE)
                continue
            if place in logprobs:
                self._logprobs[row].append(logprobs[place])
            if reason := self._outputs[row].append(token):
                self._end(row, reason, self._outputs[row].error)

    def _end(self, row: int, reason: FinishReason, error: tuple[str, str] | None = None) -> None:
        self.is_done[row] = True
        answer = self._answers[row]
        answer.finish_reason = reason
        answer.finished_ns = time.monotonic_ns()
        if error is not None:
            answer.error_code, answer.error_message = error

    def answers(self, stats: StepStats) -> list[Generation]:
        """The rows' generations, with what was computed counted and its time shared out."""
        self._stamps[-1] = time.monotonic_ns()  # the last step ends with the batch
        lengths = [len(each.prompt_token_ids) for each in self._sequences]
        stats.useful_tokens += sum(lengths) + sum(self._steps)
        stats.padded_tokens += len(lengths) * (max(lengths) + max(self._steps))
        shares = shares_of(self._stamps, lengths, self._steps)
        for row, (prefill_ns, decode_ns) in enumerate(shares):
            answer = self._answers[row]
            answer.device_ns = prefill_ns + decode_ns
            answer.breakdown = Breakdown(prefill_ns)
            answer.started_ns = self._stamps[0]
            answer.first_token_ns = self._stamps[1] if self._steps[row] else 0
            answer.token_ids, answer.text = self._outputs[row].token_ids, self._outputs[row].text
            params = self._sequences[row].params
            if params and params.logprobs is not None:
                answer.logprobs = self._logprobs[row]
        return self._answers


class _Choose(LogitsProcessor):
    """Leaves of each row's scores only the token that the sampler took."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self._rows.step(scores, input_ids)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Tells `generate` row by row who is done; it stops when all are."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.tensor(self._rows.is_done, device=input_ids.device)


def _longest_output(sequences: Seq[Sequence]) -> int:
    return max(each.params.max_tokens for each in sequences if each.params)


def _plain(model: Any) -> GenerationConfig:
    """What a model starts from; how to choose and when to stop is the sampler's matter."""
    given = model.generation_config
    kept = {name: getattr(given, name, None) for name in ("bos_token_id", "decoder_start_token_id")}
    # Any id will do where there is none: padding is masked. Some count places by the one there is.
    pads = (given.pad_token_id, getattr(model.config, "pad_token_id", None), 0)
    kept["pad_token_id"] = next(pad for pad in pads if pad is not None and pad >= 0)
    return GenerationConfig(**kept)  # type: ignore[no-untyped-call]
