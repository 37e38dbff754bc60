"""What an engine is: sequences of token ids in, generations out.

An engine owns one model on one device. It knows nothing of Celery, Redis or Postgres; the engine
process (`app.worker.engine.process`) drives it, and so can any script on a bare GPU machine:

    engine.admit("batch-1", sequences)
    while engine.has_work:
        generations = engine.step()
        for new in engine.take_tokens():  # of sequences with `stream`
            print(new.text, end="")
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from decimal import Decimal
from operator import attrgetter
from typing import Any, Final, Protocol

from app.jobs import WHOLE, FinishReason, PoolingParams, SamplingParams


@dataclass(frozen=True, slots=True)
class Sequence:
    """One prompt inside an engine. `id` is unique within the engine process."""

    id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams | None = None  #: None where no text is generated
    tenant: str = "default"  #: prefix caches never cross it
    priority: int = 0
    adapter: str = ""  #: the model's LoRA adapter to run it with
    stream: bool = False  #: its tokens leave through `take_tokens` as they come
    pooling: PoolingParams = WHOLE  #: of a text that gets one answer
    token_type_ids: tuple[int, ...] = ()  #: of a pair: which of both each token is of; () is all 0
    arrived_ns: int = 0  #: when it came to this machine, by `time.monotonic_ns()`; 0: not known

    def __reduce__(self) -> tuple[type[Sequence], tuple[Any, ...]]:
        """There may be thousands a second, and what dataclasses do for it is slow."""
        return Sequence, _fields(self)

    @property
    def max_total_tokens(self) -> int:
        return len(self.prompt_token_ids) + (self.params.max_tokens if self.params else 0)


_fields: Final = attrgetter(*Sequence.__slots__)

LEAST_LOGPROB: Final = -9999.0
"""Of a token that cannot come, as in the OpenAI API: JSON has no word for minus infinity."""


def finite(logprob: float) -> float:
    """A log probability that JSON can hold, whatever an engine makes of it."""
    if math.isfinite(logprob):
        return max(logprob, LEAST_LOGPROB)
    return 0.0 if logprob > 0 else LEAST_LOGPROB


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  #: (token id, logprob), most likely first


@dataclass(slots=True)
class Breakdown:
    """What the device time of a sequence was for, and when it had none."""

    prefill_ns: int = 0  #: of `Generation.device_ns`, for its prompt
    recomputed_ns: int = 0  #: of it, for what a preemption had dropped; the rest is for its output
    preemptions: int = 0  #: times it gave way to others
    preempted_ns: int = 0  #: for how long


@dataclass(slots=True)
class Generation:
    """The engine's answer for one sequence, whole or cut short.

    Stamps are `time.monotonic_ns()`, comparable between processes of one machine. `device_ns` is
    this sequence's share of the measured device time; the shares of all sequences in a step add up
    to that step's time exactly.
    """

    sequence_id: int
    finish_reason: FinishReason
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None  #: from the prompt's second token on
    embedding: list[float] | None = None
    scores: list[float] | None = None  #: a number for each class; one of a pair
    input_tokens: int = 0
    counted_tokens: int | None = None  #: of the output, where a server tells their number alone
    charge: Decimal | None = None  #: what a server asks for this, by its own words
    cached_tokens: int = 0  #: of the prompt, that were not computed for it
    device_ns: int = 0
    breakdown: Breakdown | None = None  #: None: the engine cannot tell
    started_ns: int = 0
    first_token_ns: int = 0
    finished_ns: int = 0
    error_code: str | None = None  #: set with FinishReason.ERROR; stable, see app.errors
    error_message: str | None = None

    @property
    def is_cut_short(self) -> bool:
        return self.finish_reason is FinishReason.CANCELLED

    @property
    def output_tokens(self) -> int:
        return len(self.token_ids) if self.counted_tokens is None else self.counted_tokens


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What is new of a sequence that streams.

    `text` ends where a character does, and before anything that may become a stop string, so it may
    lag behind the tokens. All of a sequence's texts together are that of its `Generation`.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()  #: of these tokens, where they are asked for


@dataclass(slots=True)
class StepStats:
    """What one call of `step` computed, for the batch record and the books."""

    batch_id: str
    rows: int = 0
    useful_tokens: int = 0  #: prompt and output tokens somebody asked for
    padded_tokens: int = 0  #: token positions the device computed, padding included
    device_ns: int = 0  #: shared out to sequences; over time as much as their answers say

    def add(self, other: StepStats) -> None:
        """What another step of the same batch computed."""
        self.rows += other.rows
        self.useful_tokens += other.useful_tokens
        self.padded_tokens += other.padded_tokens
        self.device_ns += other.device_ns


NOT_FINITE: Final = (
    "not_finite",
    "The model computed something that is not a number for this prompt.",
)
"""error_code and error_message of a row whose logits, scores or embedding are NaN or infinite."""


class Engine(Protocol):
    """One model on one device.

    `admit` takes what the batcher closed and returns at once. `step` runs one unit of work: a
    decode step for an engine in flight, the whole batch for a static one. `cancel` may be called
    from another thread at any time: it frees the row within one step and the sequence still comes
    back, with what it has, as `FinishReason.CANCELLED`. A row's own error (token ids out of range,
    NaN logits) comes back as `FinishReason.ERROR` of that row. `OutOfMemory` raised from `step`
    means the whole batch was dropped unharmed.
    """

    def admit(self, batch_id: str, sequences: Seq[Sequence]) -> None: ...

    def step(self) -> list[Generation]: ...

    def cancel(self, sequence_id: int) -> None: ...

    def take_tokens(self) -> list[NewTokens]:
        """New tokens of the sequences that stream, since the last call; call it after each step.

        The last ones of a sequence are there when `step` has returned its generation. `OutOfMemory`
        makes void what was streamed of the sequences that it drops.
        """
        ...

    @property
    def joins(self) -> bool:
        """Whether sequences may be admitted while others run."""
        ...

    @property
    def has_work(self) -> bool: ...

    @property
    def free_rows(self) -> int:
        """Rows that may be admitted now; a static engine has none while a batch is inside."""
        ...

    def take_stats(self) -> list[StepStats]:
        """What was computed since the last call, one entry a batch, and forget it."""
        ...

    def close(self) -> None: ...


Progress = Callable[[], None]
"""Called by an engine after each model step, so that a hung device can be told from a busy one."""
