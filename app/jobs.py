"""The vocabulary of a job: its states, the moves between them, and what is recorded of it.

Pure but for `new_id`: no I/O, no clock. The states and the only moves (invariant I3, forward only):

    queued ──claim──▶ running ──finish──▶ completed | failed | cancelled | expired
       ▲                 │
       └────release──────┘        (a lost lease, a shutdown, a crash beside others)
    queued ──▶ cancelled | expired | failed      (without ever running)

Retry is not a state: a job that runs again is `queued`.
"""

from __future__ import annotations

import enum
import secrets
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

DEFAULT_TENANT: Final = "default"
"""Whose all is where nobody asks for keys."""

MAX_PRIORITY: Final = 9
"""Priorities run from 0, served first and the default (as in Celery on Redis), to 9."""

LIVE_PRIORITY: Final = -1
"""Of calls that are waited for, as /v1/chat/completions is: in front of all that runs in the
background. Nobody can ask for it."""


_TASK_IDS: Final = uuid.UUID("6b9d3c1e-5c0a-5f0e-9d53-2f4e1a7c8b60")


def job_id_of(text: str) -> uuid.UUID:
    """The job id for a Celery task id.

    A UUID stands for itself. Celery takes any text as a task id; other texts are mapped to a UUID
    (version 5, RFC 9562), the same one every time, here and in the status API.
    """
    try:
        return uuid.UUID(text)
    except ValueError:
        return uuid.uuid5(_TASK_IDS, text)


_DIGITS: Final = 32  #: of an id, without hyphens


def digits_of(job_ids: Iterable[uuid.UUID]) -> str:
    """Ids in a row, for news of them."""
    return "".join(job_id.hex for job_id in job_ids)


def job_ids_in(digits: str) -> frozenset[uuid.UUID]:
    """The ids that `digits_of` wrote; none in what somebody else did."""
    try:
        places = range(0, len(digits), _DIGITS)
        return frozenset(uuid.UUID(hex=digits[at : at + _DIGITS]) for at in places)
    except ValueError:
        return frozenset()


def new_id() -> uuid.UUID:
    """A random id that is greater than the earlier ones of this machine: UUID version 7, RFC 9562.

    48 bits of Unix time in ms, 12 of the ms' fraction (its method 3), 62 random ones. Indexes of
    such ids grow at one end, where the last pages are warm.
    """
    ms, rest_ns = divmod(time.time_ns(), 1_000_000)
    stamp = ms << 16 | 7 << 12 | (rest_ns << 12) // 1_000_000
    return uuid.UUID(int=stamp << 64 | 0b10 << 62 | secrets.randbits(62))


EARLIEST: Final = datetime(1, 1, 2, tzinfo=UTC)
LATEST: Final = datetime(9999, 12, 30, tzinfo=UTC)
"""The times that Postgres, Python and JSON can all hold, in any time zone."""


def bounded(stamp: datetime) -> datetime:
    """An aware time in UTC; one beyond `EARLIEST` or `LATEST` becomes the nearer of the two.

    So "never", however it is spelled, stays as good as never.
    """
    return min(max(stamp, EARLIEST), LATEST).astimezone(UTC)


def int64(number: int) -> int:
    """Any whole number wrapped to a signed one of 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


class Kind(enum.StrEnum):
    """What a model does; it decides which requests it takes."""

    GENERATE = "generate"  #: tokens to tokens: chat and completions
    EMBED = "embed"  #: tokens to one vector
    CLASSIFY = "classify"  #: tokens to a score for each of the model's classes
    TRANSLATE = "translate"  #: tokens to those of another language
    RERANK = "rerank"  #: a pair of texts to how well they fit: rerank and score


class JobState(enum.StrEnum):
    QUEUED = "queued"  #: waits for a worker; `not_before` may lie in the future
    RUNNING = "running"  #: claimed by a worker under an attempt whose lease is alive
    COMPLETED = "completed"  #: answered; the result row holds the response
    FAILED = "failed"  #: ended by an error that a retry would not mend, or out of attempts
    CANCELLED = "cancelled"  #: ended by the caller; partial output is kept where there is some
    EXPIRED = "expired"  #: its deadline passed first; partial output is kept where there is some

    @property
    def is_final(self) -> bool:
        return self in FINAL_STATES


FINAL_STATES: Final = frozenset(
    {JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}
)

OPEN_STATES: Final = frozenset(JobState) - FINAL_STATES
REPLAYED: Final = FINAL_STATES - {JobState.COMPLETED}
"""Jobs that ended so may be replayed: their request is run once more as a new job."""

TRANSITIONS: Final[dict[JobState, frozenset[JobState]]] = {
    JobState.QUEUED: frozenset(
        {JobState.RUNNING, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}
    ),
    JobState.RUNNING: frozenset({JobState.QUEUED, *FINAL_STATES}),
    **{state: frozenset() for state in FINAL_STATES},
}


def can_move(before: JobState, after: JobState) -> bool:
    """Whether a job may go from one state straight to another."""
    return after in TRANSITIONS[before]


class AttemptOutcome(enum.StrEnum):
    """How one try of a job by one worker ended; absent while it runs."""

    SUCCEEDED = "succeeded"  #: its result was committed
    FAILED = "failed"  #: the engine answered with an error, or the caller cancelled it
    LOST = "lost"  #: the worker died under it; charged only if nothing else ran there
    RELEASED = "released"  #: given back unharmed at a shutdown; not charged


MAX_UNCHARGED: Final = 20
"""Attempts that were nobody's fault, after which a job fails all the same."""

SUSPECT_AFTER: Final = 2
"""A job that was lost so often with its worker may be why: it runs apart, in small groups."""

ALONE_AFTER: Final = 3
"""A job that was lost so often runs alone, and is charged if it is lost again."""

MAX_SUSPECTS: Final = 8
"""Jobs of a group of suspects that may still be innocent."""


def max_company(losses: int) -> int:
    """How many jobs a suspect's group may have, itself included, after so many lost workers."""
    return 1 if losses >= ALONE_AFTER else MAX_SUSPECTS


class CloseReason(enum.StrEnum):
    """Why an admission batch was closed."""

    SIZE = "size"  #: `max_batch_size` members
    TOKENS = "tokens"  #: the next member would pass `max_batch_tokens`
    WAIT = "wait"  #: the oldest member had waited for company as long as any does
    JOIN = "join"  #: the engine takes sequences between its steps, so company can come later


class FinishReason(enum.StrEnum):
    """Why a sequence stopped."""

    STOP = "stop"  #: the model ended it, or a stop string was met
    LENGTH = "length"  #: `max_tokens` reached
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one job. Input counts every prompt token, cached ones too (OpenAI's convention)."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  #: of the input, not computed but found in a prefix cache

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output must match, as a whole: a JSON schema, as JSON, a regular expression, or the
    right side of `start` and further rules in llguidance's Lark notation."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled. Every row of a batch may differ in all of these."""

    max_tokens: int
    temperature: float = 1.0  #: 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  #: 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  #: (token id, what its logit is raised by)
    bad_words: tuple[tuple[int, ...], ...] = ()  #: token ids that never follow each other
    min_tokens: int = 0  #: nothing but `max_tokens` or the grammar ends it before it has so many
    stop: tuple[str, ...] = ()  #: the text ends before the first of these
    stop_token_ids: tuple[int, ...] = ()  #: each of these ends the output, `ignore_eos` or not
    seed: int | None = None  #: same seed, prompt and model: same text, whatever the company
    logprobs: int | None = None  #: None = off; k = the chosen token and the k most likely ones
    prompt_logprobs: int | None = None  #: the same for the tokens of the prompt, from the second on
    ignore_eos: bool = False
    unset: frozenset[str] = frozenset()  #: fields here that the request leaves to the model
    grammar: Grammar | None = None  #: its end ends the output, `ignore_eos` or not
    num_beams: int | None = None  #: of a search instead of draws; 1 = none, None = the model's own
    length_penalty: float | None = None  #: of a search: above 0 favours long answers
    early_stopping: bool | Literal["never"] | None = None  #: of a search: when it is over
    beam: int = 0  #: which answer of a search, from the best on
    decoder_start_token_id: int | None = None  #: an encoder-decoder's; None = the model's own
    forced_bos_token_id: int | None = None  #: the only first token; None = the model's own


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """How the one answer to a text is given, where nothing is generated."""

    use_activation: bool = True  #: False: vectors of their own length, logits for scores
    dimensions: int | None = None  #: of a vector that is cut; None is all
    skip: int = 0  #: first tokens that are read and not pooled


WHOLE: Final = PoolingParams()
