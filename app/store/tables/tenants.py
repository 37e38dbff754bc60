"""Who shares the system: tenants, their API keys, and what was done about them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from app.store.tables.columns import (
    Money,
    Stamp,
    in_range,
    metadata,
    not_negative,
    tenant_column,
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", Text, primary_key=True, comment="What `tenant` is in every other table."),
    Column(
        "created_at", Stamp, nullable=False, server_default=text("now()"), comment="Added then."
    ),
    Column(
        "weight",
        Integer,
        nullable=False,
        server_default=text("1"),
        comment="Its share of the devices beside that of others.",
    ),
    Column("max_requests_per_minute", Integer, comment="Calls that submit; null is any number."),
    Column("max_open_jobs", Integer, comment="Queued and running at once; null is any number."),
    Column(
        "max_queued_tokens",
        BigInteger,
        comment="Of queued jobs, with those that they may generate; null is any number.",
    ),
    Column("max_cost_per_day", Money, comment="Of jobs that ended in a day, in UTC; null is any."),
    Column("max_cost_per_month", Money, comment="The same of a month."),
    Column("currency", Text, comment="ISO 4217 code of both; other currencies do not count."),
    not_negative("max_cost_per_day", "max_cost_per_month"),
    CheckConstraint(
        "max_requests_per_minute >= 1 AND max_open_jobs >= 1 AND max_queued_tokens >= 1",
        name="limits",
    ),
    CheckConstraint(
        "coalesce(max_cost_per_day, max_cost_per_month) IS NULL OR currency IS NOT NULL",
        name="currency",
    ),
    CheckConstraint("name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'", name="name"),
    CheckConstraint("weight BETWEEN 1 AND 1000", name="weight"),
    comment="One row per tenant; `default` is whoever is not named.",
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True, comment="Second part of the key; no secret."),
    tenant_column("Whose key it is."),
    Column("name", Text, nullable=False, comment="What it is for, in its owner's words."),
    Column("scopes", ARRAY(Text), nullable=False, comment="Of submit, read and admin."),
    Column("digest", LargeBinary, nullable=False, comment="SHA-256 of the whole key."),
    Column("created_at", Stamp, nullable=False, server_default=text("now()"), comment="Made then."),
    Column("expires_at", Stamp, comment="Of no use from then on; null is never."),
    Column("revoked_at", Stamp, comment="Of no use since then; null is not revoked."),
    Column("last_used_at", Stamp, comment="Last use, to some minutes; null is never."),
    CheckConstraint("octet_length(digest) = 32", name="digest"),
    CheckConstraint(
        "scopes <@ ARRAY['submit', 'read', 'admin'] AND cardinality(scopes) > 0", name="scopes"
    ),
    CheckConstraint("char_length(name) <= 100 AND char_length(tenant) <= 200", name="lengths"),
    in_range("created_at", "expires_at"),
    Index("api_keys_by_tenant", "tenant", "created_at"),
    comment="One row per API key, for ever: revoked and expired ones say who had them.",
)

admin_log = Table(
    "admin_log",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True, comment="In their order."),
    tenant_column("Whom it was about."),
    Column("at", Stamp, nullable=False, server_default=text("now()"), comment="When."),
    Column("actor", Text, nullable=False, comment="Who: `cli:USER@HOST`, `key:ID` or `anybody`."),
    Column("action", Text, nullable=False, comment="What, as in key.created."),
    Column("subject", Text, nullable=False, comment="Id of the key or job, or a tenant's name."),
    Column(
        "details",
        JSONB,
        nullable=False,
        server_default=text("'{}'::jsonb"),
        comment="What else there is to tell; no secret, and nothing that a job says.",
    ),
    Index("admin_log_by_tenant", "tenant", "id"),
    comment="What was done about keys, tenants and content. Rows are only added.",
)
