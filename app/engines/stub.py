"""An engine without a model, for tests and for benchmarks of everything around the engine.

It echoes the prompt, one byte a step, or gives a hash of it as an embedding or scores. The last
line of a prompt may ask for trouble instead:

    sleep MS      takes so many milliseconds longer
    nan           fails alone, as a row with NaN logits does
    oom above N   the batch does not fit if it has more than N rows
    crash         the process dies
    assert        the device breaks: this step and all later ones raise
    eat MB        takes so much memory for as long as it runs
    kill          the process and its parent, the worker, are killed
    hang          the step never ends and shows no progress

A grammar is taken and not heeded: the echo is what it is.

Options: `step_ms` and `row_ms`, the time of a step and what each row adds; `load_ms`, the time to
load; `joins`, whether rows may enter while others run, as in an engine in flight.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Final

from app.books.shares import share
from app.config.settings import ModelSettings
from app.engines.base import (
    NOT_FINITE,
    Breakdown,
    Generation,
    NewTokens,
    Progress,
    Sequence,
    TokenLogprob,
)
from app.engines.joining import JoiningEngine
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import StubTokenizer
from app.errors import OutOfMemory
from app.jobs import FinishReason, Kind, SamplingParams

CRASHED: Final = 70  #: exit status
EMBEDDING_SIZE: Final = 8


class _Row:
    """A sequence inside, and what its prompt asks for."""

    def __init__(self, sequence: Sequence, batch_id: str, tokenizer: StubTokenizer) -> None:
        prompt = tokenizer.decode(sequence.prompt_token_ids)
        verb, *numbers = prompt.rpartition("\n")[2].replace("above ", "").split(" ")
        number = int(numbers[0]) if numbers and numbers[0].isdigit() else 0
        now = time.monotonic_ns()
        self.sequence = sequence
        self.batch_id = batch_id
        self.verb = verb
        self.awake_ns = now + (number * 1_000_000 if verb == "sleep" else 0)
        self.max_rows = number if verb == "oom" else math.inf
        self.eats_bytes = number << 20 if verb == "eat" else 0
        self.eaten = b""
        self.left = [tokenizer.EOS, *reversed(sequence.prompt_token_ids)]
        self.output = Output(
            sequence.params or SamplingParams(max_tokens=1),
            tokenizer,
            sequence.prompt_token_ids,
            stream=sequence.stream,
        )
        self.breakdown = Breakdown()
        self.generation = Generation(
            sequence.id,
            FinishReason.STOP,
            input_tokens=len(sequence.prompt_token_ids),
            breakdown=self.breakdown,
            started_ns=now,
        )


class StubEngine(JoiningEngine):
    kernels = "none"

    def __init__(
        self,
        folder: Path,
        settings: ModelSettings,
        device: str,
        threads: int,
        progress: Progress,
    ) -> None:
        super().__init__()
        self.joins = bool(settings.options.get("joins", False))
        self._step_ns = int(float(settings.options.get("step_ms", 0)) * 1e6)
        self._row_ns = int(float(settings.options.get("row_ms", 0)) * 1e6)
        self._max_rows = settings.max_batch_size
        self._kind = settings.kind
        self._tokenizer = StubTokenizer(settings)
        self._progress = progress
        self._rows: list[_Row] = []
        self._is_broken = False
        _pause(float(settings.options.get("load_ms", 0)) / 1_000)
        self._cancelled: set[int] = set()

    def admit(self, batch_id: str, sequences: Seq[Sequence]) -> None:
        self._rows += [_Row(sequence, batch_id, self._tokenizer) for sequence in sequences]
        stats = self._stats_of(batch_id)
        stats.rows += len(sequences)
        stats.useful_tokens += sum(len(sequence.prompt_token_ids) for sequence in sequences)
        stats.padded_tokens = stats.useful_tokens

    def step(self) -> list[Generation]:
        if self._is_broken:
            raise RuntimeError("device-side assert triggered")
        if any(len(self._rows) > row.max_rows for row in self._rows):
            self._rows.clear()
            raise OutOfMemory
        began = time.monotonic_ns()
        ended = {row: reason for row in self._rows if (reason := self._advance(row, began))}
        self._take_time(began)
        self._rows = [row for row in self._rows if row not in ended]
        self._progress()
        return [self._generation(row, reason) for row, reason in ended.items()]

    def cancel(self, sequence_id: int) -> None:
        self._cancelled.add(sequence_id)

    @property
    def has_work(self) -> bool:
        return bool(self._rows)

    @property
    def free_rows(self) -> int:
        if self._rows and not self.joins:
            return 0
        return self._max_rows - len(self._rows)

    def close(self) -> None:
        self._rows.clear()

    def _advance(self, row: _Row, now_ns: int) -> FinishReason | None:
        """One step of one row: its next token, or why it ends."""
        if row.sequence.id in self._cancelled:
            return FinishReason.CANCELLED
        if row.verb == "crash":
            os._exit(CRASHED)
        if row.verb == "kill":
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(CRASHED)
        while row.verb == "hang":
            time.sleep(1)
        if row.verb == "assert":
            self._is_broken = True
            raise RuntimeError("device-side assert triggered")
        if row.eats_bytes and not row.eaten:
            row.eaten = b"\1" * row.eats_bytes
        if row.verb == "nan":
            return FinishReason.ERROR
        if now_ns < row.awake_ns:
            return None
        if row.sequence.params is None:
            self._answer_at_once(row)
            return FinishReason.STOP
        token = row.left.pop() if row.left else StubTokenizer.EOS
        reason = row.output.append(token)
        if row.sequence.stream:
            k = row.sequence.params.logprobs
            scored = () if k is None else (TokenLogprob(token, 0.0, ((token, 0.0),)[:k]),)
            new = NewTokens(row.sequence.id, (token,), row.output.take_text(), scored)
            self._new_tokens.append(new)
        stats = self._stats_of(row.batch_id)
        stats.useful_tokens += 1
        stats.padded_tokens += 1
        return reason

    def _answer_at_once(self, row: _Row) -> None:
        vector = _embedding(row.sequence.prompt_token_ids)
        match self._kind:
            case Kind.CLASSIFY:
                likely = (1 + vector[0]) / 2
                row.generation.scores = [likely, 1 - likely]
            case Kind.RERANK:
                row.generation.scores = [(1 + vector[0]) / 2]
            case _:
                asked = row.sequence.pooling
                row.generation.embedding = vector[: asked.dimensions]

    def _take_time(self, began_ns: int) -> None:
        """Let the step last as long as it is set to, and share its time over the rows in it."""
        lasts = self._step_ns + self._row_ns * len(self._rows)
        asleep = all(began_ns < row.awake_ns for row in self._rows)
        _pause(max(lasts, 1_000_000 if asleep else 0) / 1e9)
        now = time.monotonic_ns()
        shares = share(now - began_ns, [1] * len(self._rows))
        for row, device_ns in zip(self._rows, shares, strict=True):
            row.generation.device_ns += device_ns
            if not row.generation.first_token_ns:
                row.breakdown.prefill_ns += device_ns
            row.generation.first_token_ns = row.generation.first_token_ns or (
                now if row.output.token_ids else 0
            )
            self._stats_of(row.batch_id).device_ns += device_ns

    def _generation(self, row: _Row, reason: FinishReason) -> Generation:
        self._cancelled.discard(row.sequence.id)
        if row.sequence.stream and (rest := row.output.take_rest()):
            self._new_tokens.append(NewTokens(row.sequence.id, (), rest))
        answer = row.generation
        answer.finish_reason = reason
        answer.finished_ns = time.monotonic_ns()
        answer.token_ids, answer.text = row.output.token_ids, row.output.text
        if row.sequence.params and row.sequence.params.logprobs is not None:
            k = row.sequence.params.logprobs
            answer.logprobs = [
                TokenLogprob(token, 0.0, ((token, 0.0),)[:k]) for token in answer.token_ids
            ]
        if row.sequence.params and row.sequence.params.prompt_logprobs is not None:
            k = row.sequence.params.prompt_logprobs
            answer.prompt_logprobs = [
                TokenLogprob(token, 0.0, ((token, 0.0),)[:k])
                for token in row.sequence.prompt_token_ids[1:]
            ]
        if reason is FinishReason.ERROR:
            answer.error_code, answer.error_message = NOT_FINITE
        return answer


def _embedding(token_ids: Seq[int]) -> list[float]:
    """A unit vector that depends on the text alone."""
    digest = hashlib.sha256(bytes(token_ids)).digest()[:EMBEDDING_SIZE]
    raw = [byte - 127.5 for byte in digest]
    return [each / math.hypot(*raw) for each in raw]


def _pause(seconds: float) -> None:
    """Not time.sleep: it fails under libfaketime, with which clocks are made to jump."""
    threading.Event().wait(seconds)
