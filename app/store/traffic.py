"""What came and what it took, for who tries other settings on it. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, text

from app.jobs import FINAL_STATES


@dataclass(frozen=True, slots=True)
class Came:
    """An ended job that ran, as it came."""

    at: datetime  #: accepted, or due if that was later
    rows: int  #: its sequences; where its batch had others, their mean
    input_tokens: int  #: of all its prompts
    output_tokens: int  #: most allowed, of all its sequences
    generated: int  #: of these, in all its sequences
    inference_ns: int  #: from its start in the engine to its last token; 0 if that is not known
    device_ns: int  #: its share of the device


@dataclass(frozen=True, slots=True)
class Ran:
    """A batch that ran."""

    rows: int
    device_ns: int


_STATES: Final = ", ".join(f"('{state}')" for state in sorted(FINAL_STATES))

# The last jobs of a model: an index has them by tenant and state.
_CAME: Final = text(f"""
    SELECT greatest(job.created_at, job.not_before) AS at,
        greatest(1, coalesce(round(batch.num_sequences / nullif(batch.num_jobs, 0)), 1)) AS rows,
        coalesce(job.input_tokens, job.expected_input_tokens, 0) AS input_tokens,
        coalesce(job.max_output_tokens, 0) AS output_tokens,
        coalesce(job.output_tokens, 0) AS generated,
        CAST(coalesce(job.inference_ms, 0) * 1e6 AS bigint) AS inference_ns, job.device_ns
    FROM (
        SELECT last.*
        FROM (SELECT DISTINCT tenant FROM usage WHERE model = :model) AS asked
        CROSS JOIN (VALUES {_STATES}) AS ended (state)
        CROSS JOIN LATERAL (
            SELECT created_at, not_before, input_tokens, expected_input_tokens, max_output_tokens,
                batch_id, output_tokens, inference_ms, device_ns
            FROM results
            WHERE tenant = asked.tenant AND model = :model AND state = ended.state
                AND created_at >= :since AND created_at < :until AND batch_id IS NOT NULL
            ORDER BY created_at DESC LIMIT :most
        ) AS last
        ORDER BY created_at DESC LIMIT :most
    ) AS job LEFT JOIN batches AS batch ON batch.id = job.batch_id
    ORDER BY at
""")

# The last batches of a model that are over.
_RAN: Final = text("""
    SELECT num_sequences AS rows, device_ns FROM batches
    WHERE model = :model AND claimed_at >= :since AND claimed_at < :until
        AND finished_at IS NOT NULL AND device_ns > 0
    ORDER BY claimed_at DESC LIMIT :most
""")


def came(
    connection: Connection, model: str, since: datetime, until: datetime, most: int
) -> list[Came]:
    """The last jobs of a model that were accepted in this time and ran, by when they came."""
    given = {"model": model, "since": since, "until": until, "most": most}
    return [Came(row.at, int(row.rows), *row[2:]) for row in connection.execute(_CAME, given)]


def ran(
    connection: Connection, model: str, since: datetime, until: datetime, most: int
) -> list[Ran]:
    """The last batches of a model that were claimed in this time, latest first."""
    given = {"model": model, "since": since, "until": until, "most": most}
    return [Ran(row.rows, row.device_ns) for row in connection.execute(_RAN, given)]
