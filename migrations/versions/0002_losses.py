"""How often a job was lost with its worker."""

from alembic import op
from sqlalchemy import Column, SmallInteger, text

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # With a constant default no row is rewritten, and code of before does not see the column.
    op.add_column(
        "jobs",
        Column(
            "losses",
            SmallInteger,
            server_default=text("0"),
            nullable=False,
            comment="Times its worker was lost while it ran; "
            "a suspect from app.jobs.SUSPECT_AFTER on.",
        ),
    )


def downgrade() -> None:
    op.drop_column("jobs", "losses")
