"""Webhooks: who receives them, what is to be delivered, and each attempt."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY

from app.store.tables.columns import BUSY, Stamp, in_range, metadata, not_negative, tenant_column

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", Uuid, primary_key=True, comment="A new id for each."),
    tenant_column("Whose events it receives."),
    Column("name", Text, nullable=False, comment="The tenant's word for it."),
    Column(
        "url",
        Text,
        comment="Where events go; null for the one that signs for webhook_url of jobs and batches.",
    ),
    Column(
        "event_types", ARRAY(Text), nullable=False, comment="Which events; see app.webhooks.events."
    ),
    Column("secret", Text, nullable=False, comment="Signs; sealed if a key is configured."),
    Column("secret_hint", Text, nullable=False, comment="What of the secret may be shown."),
    Column("old_secret", Text, comment="The one before, which signs as well for a while."),
    Column("old_secret_until", Stamp, comment="For how long it does."),
    Column("created_at", Stamp, nullable=False, comment="Made."),
    Column("updated_at", Stamp, nullable=False, comment="Its settings or secret last changed."),
    Column(
        "disabled_at",
        Stamp,
        comment="It answered 410: nothing goes there until it is updated; null if it receives.",
    ),
    in_range("old_secret_until", "created_at", "updated_at", "disabled_at"),
    CheckConstraint("num_nulls(old_secret, old_secret_until) IN (0, 2)", name="old_secret"),
    CheckConstraint(
        "char_length(tenant) <= 200 AND char_length(name) BETWEEN 1 AND 200"
        " AND char_length(url) <= 2100",
        name="lengths",
    ),
    # Listing; who receives an event.
    Index("webhook_endpoints_by_tenant", "tenant", "created_at", "id"),
    Index("webhook_endpoints_own", "tenant", unique=True, postgresql_where=text("url IS NULL")),
    comment="One row per receiver of a tenant's events.",
)

webhook_receivers = Table(
    "webhook_receivers",
    metadata,
    tenant_column("Whose webhooks."),
    Column("origin", Text, nullable=False, comment="Scheme, host and port of its URLs."),
    Column(
        "failures",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="Attempts in a row that it did not answer, or answered 429 or 5xx.",
    ),
    Column("retry_at", Stamp, comment="It rests until then; null if it does not."),
    in_range("retry_at"),
    not_negative("failures"),
    PrimaryKeyConstraint("tenant", "origin"),
    postgresql_with={"fillfactor": "50"} | BUSY,
    comment="One row per server that receives a tenant's webhooks: whether it is well.",
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", Uuid, primary_key=True, comment="A new id for each."),
    tenant_column("Whose event it is."),
    Column(
        "event_id",
        Uuid,
        nullable=False,
        comment="The event's: the id of what ended; that of a test is a new one.",
    ),
    Column("endpoint_id", Uuid, comment="Who receives it; null for a webhook_url of its own."),
    Column("type", Text, nullable=False, comment="What happened, as job.completed."),
    Column("object_id", Text, nullable=False, comment="To what, as the API names it."),
    Column("url", Text, nullable=False, comment="Where it goes."),
    Column("origin", Text, nullable=False, comment="Its receiver: scheme, host and port."),
    Column("state", Text, nullable=False, comment="pending, delivered or failed."),
    Column(
        "is_test",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="Asked for by its tenant, and tried once.",
    ),
    Column(
        "attempts",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="Attempts that were begun, ever.",
    ),
    Column(
        "attempts_before",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="Of these, before it was last replayed.",
    ),
    Column("created_at", Stamp, nullable=False, comment="The event's."),
    Column("since", Stamp, nullable=False, comment="Begin of its schedule: created, or replayed."),
    Column("next_at", Stamp, comment="Due; while it is sent, until when that is waited for."),
    Column("lease", Uuid, comment="The sending under way: the fence of its record; else null."),
    Column("ended_at", Stamp, comment="Delivered or given up; null while pending."),
    Column("status_code", Integer, comment="Of the last answer; null if there was none."),
    Column("error", Text, comment="Why the last attempt failed; null if it did not."),
    in_range("created_at", "since", "next_at", "ended_at"),
    not_negative("attempts", "attempts_before"),
    CheckConstraint("attempts_before <= attempts", name="attempts"),
    CheckConstraint(
        "CASE state WHEN 'pending' THEN ended_at IS NULL AND next_at IS NOT NULL"
        " WHEN 'delivered' THEN ended_at IS NOT NULL AND error IS NULL"
        " AND num_nonnulls(next_at, lease) = 0"
        " WHEN 'failed' THEN ended_at IS NOT NULL AND error IS NOT NULL"
        " AND num_nonnulls(next_at, lease) = 0 ELSE false END",
        name="state",
    ),
    # An event goes to a receiver once.
    Index(
        "webhook_deliveries_event",
        "event_id",
        "endpoint_id",
        unique=True,
        postgresql_nulls_not_distinct=True,
    ),
    # What is due, and to whom; what an endpoint is still to get.
    Index(
        "webhook_deliveries_due",
        "tenant",
        "origin",
        "next_at",
        postgresql_where=text("state = 'pending'"),
    ),
    Index(
        "webhook_deliveries_pending",
        "endpoint_id",
        postgresql_where=text("state = 'pending'"),
    ),
    # Listing; retention.
    Index("webhook_deliveries_by_tenant", "tenant", "created_at", "id"),
    Index("webhook_deliveries_ended", "ended_at", postgresql_where=text("state <> 'pending'")),
    postgresql_with={"fillfactor": "70"} | BUSY,
    comment="One row per event and receiver: the outbox, written by what ends a job.",
)

webhook_attempts = Table(
    "webhook_attempts",
    metadata,
    Column("delivery_id", Uuid, nullable=False, comment="Delivery that was tried."),
    Column("number", Integer, nullable=False, comment="1 for its first attempt."),
    tenant_column("Whose event it was."),
    Column("started_at", Stamp, nullable=False, comment="Began."),
    Column("took_ms", Double, nullable=False, comment="Until the answer, in ms."),
    Column("status_code", Integer, comment="Of the answer; null if there was none."),
    Column("error", Text, comment="Why it failed, a word of app.webhooks.post; null if not."),
    in_range("started_at"),
    not_negative("number", "took_ms"),
    PrimaryKeyConstraint("delivery_id", "number"),
    ForeignKeyConstraint(["delivery_id"], ["webhook_deliveries.id"], ondelete="CASCADE"),
    comment="One row per attempt whose end was seen. Holds nothing of what was answered.",
)
