"""What engines share that run a batch from its first token to its last, or one part after another.

A batch has parts where its sequences must not keep each other company. Each step runs one, and its
answers leave at once; the next batch comes in after the last.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Sequence as Seq
from typing import Final

import torch

from app.config.settings import ModelSettings
from app.engines.base import Breakdown, Generation, NewTokens, Progress, Sequence, StepStats
from app.engines.device import give_back_memory, pick_device, ran_out_of_memory, use_threads
from app.engines.text.tokenizer import Tokenizer
from app.errors import ContextLengthExceeded, OutOfMemory, RequestError
from app.jobs import FinishReason


class StaticEngine(abc.ABC):
    """Owns the one batch inside; a subclass runs it. Implements `base.Engine`."""

    joins: Final = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: ModelSettings,
        device: str,
        threads: int,
        progress: Progress,
    ) -> None:
        self._tokenizer = tokenizer
        self._device = pick_device(device)
        self._progress = progress
        self._max_rows = settings.max_batch_size
        self._batch_id = ""
        self._parts: list[list[Sequence]] = []  #: of the batch inside, that are still to be run
        self._cancelled: set[int] = set()  # filled from another thread, also before admission
        self._new_tokens: list[NewTokens] = []
        self._stats: list[StepStats] = []
        use_threads(threads)

    @abc.abstractmethod
    def _check(self, sequence: Sequence) -> None:
        """Raise `RequestError` if this engine cannot run the sequence at all."""

    def _split(self, sequences: Seq[Sequence]) -> list[list[Sequence]]:
        """The parts of a batch, whose sequences may be of any kind and length."""
        return [[*sequences]]

    @abc.abstractmethod
    def _run(self, sequences: Seq[Sequence], stats: StepStats) -> list[Generation]:
        """Run a part of at least one sequence to its end, and count what it computed.

        The sum of the generations' `device_ns` is what it took.
        """

    def admit(self, batch_id: str, sequences: Seq[Sequence]) -> None:
        if self.has_work:
            raise RuntimeError("A static engine takes one batch at a time.")
        self._batch_id, self._parts = batch_id, self._split(sequences)

    def step(self) -> list[Generation]:
        """Run the next part of the batch inside; all of its sequences come back."""
        if not self.has_work:
            return []
        sequences = self._parts.pop(0)
        stats = StepStats(self._batch_id)
        try:
            ended = self._answers(sequences, stats)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            ended = None
        self._cancelled.difference_update(each.id for each in sequences)
        if ended is None:  # here, where the error no longer holds on to the batch's tensors
            self._parts = []
            give_back_memory(self._device)
            raise OutOfMemory
        stats.device_ns = sum(each.device_ns for each in ended.values())
        self._stats.append(stats)
        self._new_tokens += [
            NewTokens(each.id, (*it.token_ids,), it.text, (*(it.logprobs or ()),))
            for each in sequences
            if each.stream and (it := ended[each.id]).token_ids
        ]
        return [ended[each.id] for each in sequences]

    def _answers(self, sequences: Seq[Sequence], stats: StepStats) -> dict[int, Generation]:
        """By sequence: refused, or run together with the others."""
        ended = {each.id: found for each in sequences if (found := self._refusal(each))}
        good = [each for each in sequences if each.id not in ended]
        stats.rows = len(good)
        with torch.inference_mode():
            ended |= {each.sequence_id: each for each in self._run(good, stats)} if good else {}
        return ended

    def cancel(self, sequence_id: int) -> None:
        self._cancelled.add(sequence_id)

    @property
    def has_work(self) -> bool:
        return bool(self._parts)

    @property
    def free_rows(self) -> int:
        return 0 if self.has_work else self._max_rows

    def take_tokens(self) -> list[NewTokens]:
        taken, self._new_tokens = self._new_tokens, []
        return taken

    def take_stats(self) -> list[StepStats]:
        stats, self._stats = self._stats, []
        return stats

    def close(self) -> None:
        self._parts = []

    def _refusal(self, sequence: Sequence) -> Generation | None:
        """The answer to a sequence that is not worth running."""
        now = time.monotonic_ns()
        answer = Generation(
            sequence.id,
            FinishReason.CANCELLED,
            input_tokens=len(sequence.prompt_token_ids),
            breakdown=Breakdown(),
            started_ns=now,
            finished_ns=now,
        )
        if sequence.id in self._cancelled:
            return answer
        try:
            self._check_tokens(sequence)
            self._check(sequence)
        except RequestError as error:
            answer.finish_reason = FinishReason.ERROR
            answer.error_code, answer.error_message = error.code, error.message
            return answer
        return None

    def _check_tokens(self, sequence: Sequence) -> None:
        prompt = sequence.prompt_token_ids
        if not prompt:
            raise RequestError("The prompt has no tokens.")
        self._tokenizer.check(prompt)
        output = sequence.params.max_tokens if sequence.params else 0
        context = self._tokenizer.context_tokens
        if self._tokenizer.separate_output:
            fits = max(len(prompt), output) <= context
        else:
            fits = len(prompt) + output <= context
        if not fits:
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt)} tokens and the answer may have {output}; this "
                f"model's context is {context} tokens."
            )
