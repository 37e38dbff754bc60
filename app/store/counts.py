"""Counts: what waits and what ended lately, for admission and for metrics. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, TextClause, text

from app.jobs import JobState
from app.store.delivery import WAITING


@dataclass(frozen=True, slots=True)
class Load:
    """Jobs, and the tokens that they have and may still generate, as far as they were counted."""

    jobs: int
    tokens: int


_LOAD: Final = """
    count(*), coalesce(sum(coalesce({input_tokens}, 0) + coalesce(max_output_tokens, 0)), 0)
"""

# Measure what waits in the queues.
_QUEUED: Final = text(f"""
    SELECT {_LOAD.format(input_tokens="input_tokens")} FROM open_jobs WHERE {WAITING}
""")


def queued(connection: Connection) -> Load:
    """Queued jobs that no worker has received: the length of the queue.

    Reads all open jobs, which takes some tenths of a second for a million: keep the answer for a
    while instead of asking for every job.
    """
    return _load(connection, _QUEUED)


# Measure what ended lately.
_ENDED: Final = text(f"""
    SELECT {_LOAD.format(input_tokens="expected_input_tokens")} FROM results
    WHERE finished_at > now() - :window_s * interval '1 s'
""")


def ended(connection: Connection, window_s: float) -> Load:
    """What became final within the last `window_s`: how fast the queue drains. Reads their rows."""
    return _load(connection, _ENDED, window_s=window_s)


def _load(connection: Connection, query: TextClause, **given: object) -> Load:
    [(jobs, tokens)] = connection.execute(query, given).all()
    return Load(jobs, int(tokens))


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How many jobs of a model are queued or running."""

    model: str
    state: JobState
    num_jobs: int


# Count open jobs by model and state.
_QUEUE_DEPTHS: Final = text("""
    SELECT model, state, count(*) FROM open_jobs GROUP BY model, state ORDER BY model, state
""")


def queue_depths(connection: Connection) -> list[QueueDepth]:
    """Open jobs by model and state. Reads only open jobs, however many are finished."""
    return [
        QueueDepth(model, JobState(state), count)
        for model, state, count in connection.execute(_QUEUE_DEPTHS)
    ]


# By the index of answers: what is read is what ended within the minute.
_PROMPT_TOKENS: Final = text("""
    SELECT model, sum(input_tokens - coalesce(cached_tokens, 0)), sum(coalesce(cached_tokens, 0))
    FROM results
    WHERE response IS NOT NULL AND input_tokens IS NOT NULL
        AND finished_at > now() - interval '1 minute'
    GROUP BY model ORDER BY model
""")


def prompt_tokens(connection: Connection) -> dict[str, tuple[int, int]]:
    """By model, prompt tokens of the answers of the last minute: computed, and found in a cache."""
    rows = connection.execute(_PROMPT_TOKENS)
    return {model: (int(computed), int(cached)) for model, computed, cached in rows}


# The oldest queued job of each model: one step into an index for each.
_OLDEST_QUEUED: Final = text("""
    SELECT given.model, extract(epoch FROM now() - oldest.created_at)
    FROM unnest(CAST(:models AS text[])) AS given (model)
    CROSS JOIN LATERAL (
        SELECT created_at FROM open_jobs
        WHERE open_jobs.model = given.model AND state = 'queued'
        ORDER BY created_at, id LIMIT 1
    ) AS oldest
""")


def oldest_queued_s(connection: Connection, models: Sequence[str]) -> dict[str, float]:
    """Seconds since the oldest queued job of each model was accepted; without those of no job."""
    rows = connection.execute(_OLDEST_QUEUED, {"models": list(models)})
    return {model: float(seconds) for model, seconds in rows}
