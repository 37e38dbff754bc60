"""Workers: their leases, loads and windows."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from app.books.energy import EnergyMethod
from app.store.tables.columns import (
    AGEING,
    Money,
    Stamp,
    energy_source,
    in_range,
    metadata,
    not_negative,
    one_of,
)

workers = Table(
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True, comment="A new id at each start of the process."),
    Column("name", Text, nullable=False, comment="Celery node name."),
    Column("host", Text, nullable=False, comment="Host name."),
    Column("pid", Integer, nullable=False, comment="Process id on that host."),
    Column("models", ARRAY(Text), nullable=False, comment="Models served."),
    Column("device", Text, nullable=False, comment="Device as its driver names it."),
    Column("device_index", Integer, comment="Its number on its host, if any."),
    Column(
        "engine",
        JSONB,
        nullable=False,
        server_default=text("'{}'::jsonb"),
        comment="Versions, and the engine and the kernels that compute, by model.",
    ),
    Column("price_id", Text, comment="Price of its device; null if it has none."),
    Column("currency", Text, comment="ISO 4217 code of the price."),
    Column("price_per_device_hour", Money, comment="Money per device and hour."),
    Column("started_at", Stamp, nullable=False, comment="Registered."),
    Column("heartbeat_at", Stamp, nullable=False, comment="Lease last renewed."),
    Column("lease_expires_at", Stamp, nullable=False, comment="Its attempts are lost after this."),
    Column("stopped_at", Stamp, comment="Said goodbye; null while up, and for ever if killed."),
    in_range("started_at", "heartbeat_at", "lease_expires_at", "stopped_at"),
    # Renewed every few seconds and tiny: room for each renewal to stay in its page.
    postgresql_with={"fillfactor": "50"},
    comment="One row per start of a worker process: its lease, device and price.",
)

loads = Table(
    "loads",
    metadata,
    Column("worker_id", Uuid, primary_key=True, comment="Worker that loads its models."),
    Column("models", ARRAY(Text), nullable=False, comment="These models."),
    Column("began_at", Stamp, nullable=False, comment="Began."),
    Column("ended_at", Stamp, comment="Has loaded them all; null until then, or if it failed."),
    in_range("began_at", "ended_at"),
    Index("loads_by_age", "began_at"),
    comment="One row per start of a worker: how long it loaded its models.",
)

windows = Table(
    "windows",
    metadata,
    Column("worker_id", Uuid, nullable=False, comment="Worker whose time it is."),
    Column("number", Integer, nullable=False, comment="From 1 on, without a gap."),
    Column("from_at", Stamp, nullable=False, comment="`until_at` less `up_ns`."),
    Column("until_at", Stamp, nullable=False, comment="Closed."),
    Column(
        "up_ns",
        BigInteger,
        nullable=False,
        comment="Time that the engine process was up, in nanoseconds: the sum of the next six.",
    ),
    Column("load_ns", BigInteger, nullable=False, comment="Loading models, in nanoseconds."),
    Column(
        "busy_ns",
        BigInteger,
        nullable=False,
        comment="Billed by attempts that were settled in it, in nanoseconds: their device_ns.",
    ),
    Column("idle_ns", BigInteger, nullable=False, comment="Nothing to run, in nanoseconds."),
    Column(
        "waste_ns",
        BigInteger,
        nullable=False,
        comment="Computed in vain, in nanoseconds: their wasted_ns, and stray_ns.",
    ),
    Column(
        "overhead_ns",
        BigInteger,
        nullable=False,
        comment="Between steps, and between engine processes, in nanoseconds.",
    ),
    Column(
        "open_ns",
        BigInteger,
        nullable=False,
        comment="Computed in it for attempts that are settled later, in nanoseconds, less "
        "what was so before and is settled in it; negative if that is more.",
    ),
    Column(
        "stray_ns",
        BigInteger,
        nullable=False,
        comment="Of waste_ns, what no attempt's row tells, in nanoseconds: it was refused or "
        "deleted.",
    ),
    Column(
        "owed_ns",
        BigInteger,
        nullable=False,
        comment="At its end: device time that is billed and not in up_ns yet, in nanoseconds.",
    ),
    Column(
        "energy_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Energy of that time, in nanojoules: the sum of the next six; 0 if absent.",
    ),
    Column(
        "load_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Of load_ns, in nanojoules.",
    ),
    Column(
        "busy_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Of the answers of attempts that were settled in it, in nanojoules: their "
        "energy_nj.",
    ),
    Column(
        "idle_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Of idle_ns, in nanojoules.",
    ),
    Column(
        "waste_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="What these attempts took in vain, in nanojoules: their wasted_nj, and stray_nj.",
    ),
    Column(
        "overhead_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Of overhead_ns, in nanojoules.",
    ),
    Column(
        "open_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Drawn in it for attempts that are settled later, in nanojoules, less what was "
        "so before and is settled in it.",
    ),
    Column(
        "stray_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Of waste_nj, what no attempt's row tells, in nanojoules.",
    ),
    *energy_source(),
    Column(
        "counter_resets",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="Times that the energy counter was seen to begin anew.",
    ),
    Column("is_last", Boolean, nullable=False, comment="The worker ended, with nothing open."),
    Column("device", Text, nullable=False, comment="Device as its driver names it."),
    Column("device_index", Integer, comment="Its number on its host, if any."),
    Column("price_id", Text, comment="Price of its device; null if it has none."),
    Column("currency", Text, comment="ISO 4217 code of the price."),
    Column("price", Money, comment="Money per device and hour."),
    Column(
        "rounding",
        Money,
        comment="Price of up_ns less the prices of its parts, each rounded by the rule of "
        "app.books.cost; busy_ns by its attempts.",
    ),
    in_range("from_at", "until_at"),
    CheckConstraint(
        "up_ns = load_ns + busy_ns + idle_ns + waste_ns + overhead_ns + open_ns", name="sum"
    ),
    CheckConstraint("busy_ns + waste_ns + open_ns >= 0 AND stray_ns <= waste_ns", name="spent"),
    not_negative(
        *("number", "up_ns", "load_ns", "busy_ns", "idle_ns", "waste_ns", "overhead_ns"),
        *("stray_ns", "owed_ns", "price"),
        *("energy_nj", "load_nj", "busy_nj", "idle_nj", "waste_nj", "overhead_nj"),
        *("stray_nj", "counter_resets"),
    ),
    CheckConstraint(
        "energy_nj = load_nj + busy_nj + idle_nj + waste_nj + overhead_nj + open_nj",
        name="energy_sum",
    ),
    CheckConstraint(
        "busy_nj + waste_nj + open_nj >= 0 AND stray_nj <= waste_nj", name="energy_spent"
    ),
    one_of("energy_method", EnergyMethod),
    CheckConstraint("num_nulls(price, price_id, currency, rounding) IN (0, 4)", name="price"),
    PrimaryKeyConstraint("worker_id", "number"),
    # Reports and retention: by time.
    Index("windows_by_time", "until_at"),
    postgresql_with=AGEING,
    comment="One row per worker and heartbeat: where the time of its device went.",
)
