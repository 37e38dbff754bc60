"""Retention, replays, and a queue that is measured in tokens and sent in order.

Columns and indexes only, so older code goes on beside it. Building an index keeps writers of its
table waiting: a second or so for a million rows.
"""

from alembic import op
from sqlalchemy import Column, Uuid, text

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

QUEUED = "state = 'queued' AND received_by IS NULL"
UNSENT = f"{QUEUED} AND enqueued_at IS NULL"
OPTIONS = {
    "jobs": {"autovacuum_vacuum_cost_limit": 2000},
    "attempts": {"autovacuum_vacuum_scale_factor": 0.05, "autovacuum_vacuum_cost_limit": 2000},
    "results": {"autovacuum_vacuum_scale_factor": 0.05, "autovacuum_vacuum_cost_limit": 2000},
    "batches": {"autovacuum_vacuum_scale_factor": 0.05, "autovacuum_vacuum_cost_limit": 2000},
}
RESPONSE = "Body of the answer, whole or partial, if any"


def upgrade() -> None:
    op.add_column(
        "jobs",
        Column("replay_of", Uuid, comment="Ended job that it runs once more; null if none."),
    )
    op.create_index(
        "jobs_replay_of",
        "jobs",
        ["replay_of"],
        unique=True,
        postgresql_where=text("replay_of IS NOT NULL"),
    )
    op.drop_index("jobs_unsent", "jobs")
    op.create_index(
        "jobs_unsent", "jobs", ["model", "priority", "not_before"], postgresql_where=text(UNSENT)
    )
    op.drop_index("jobs_waiting", "jobs")
    op.create_index(
        "jobs_waiting",
        "jobs",
        ["model", "enqueued_at"],
        postgresql_where=text(QUEUED),
        postgresql_include=["input_tokens", "max_output_tokens"],
    )
    for name, where in (
        ("jobs_finished", "finished_at IS NOT NULL"),
        ("jobs_requests", "finished_at IS NOT NULL AND request IS NOT NULL"),
    ):
        op.create_index(name, "jobs", ["tenant", "finished_at"], postgresql_where=text(where))
    op.create_index(
        "results_responses",
        "results",
        ["tenant", "finished_at"],
        postgresql_where=text("response IS NOT NULL"),
    )
    op.create_index(
        "results_by_error",
        "results",
        ["tenant", "error_code", "created_at", "job_id"],
        postgresql_where=text("error_code IS NOT NULL"),
    )
    op.create_index("batches_by_age", "batches", ["claimed_at"])
    op.alter_column("results", "response", comment=f"{RESPONSE}; null once redacted.")
    for table, options in OPTIONS.items():
        given = ", ".join(f"{name} = {value}" for name, value in options.items())
        op.execute(f"ALTER TABLE {table} SET ({given})")


def downgrade() -> None:
    for table, options in OPTIONS.items():
        op.execute(f"ALTER TABLE {table} RESET ({', '.join(options)})")
    op.alter_column("results", "response", comment=f"{RESPONSE}.")
    op.drop_index("batches_by_age", "batches")
    op.drop_index("results_by_error", "results")
    op.drop_index("results_responses", "results")
    op.drop_index("jobs_requests", "jobs")
    op.drop_index("jobs_finished", "jobs")
    op.drop_index("jobs_waiting", "jobs")
    op.create_index("jobs_waiting", "jobs", ["model", "enqueued_at"], postgresql_where=text(QUEUED))
    op.drop_index("jobs_unsent", "jobs")
    op.create_index("jobs_unsent", "jobs", ["not_before"], postgresql_where=text(UNSENT))
    op.drop_index("jobs_replay_of", "jobs")
    op.drop_column("jobs", "replay_of")
