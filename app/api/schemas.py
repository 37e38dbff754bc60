"""What the API answers with, field by field. Times are RFC 3339 in UTC."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import BaseModel, Field, PlainSerializer

from app.api.envelopes import Problem
from app.books.energy import EnergyMethod
from app.intake.outlook import Reason
from app.intake.submit import Submission
from app.jobs import AttemptOutcome, CloseReason, JobState, Kind

Money = Annotated[
    Decimal, PlainSerializer(lambda value: f"{value:f}", return_type=str, when_used="json")
]
"""An exact amount: a decimal number written as a string."""


MAX_PAGE: Final = 100
"""Jobs of a list's page."""

ModelName = Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")]


class Attempt(BaseModel):
    """One try of the job by one worker."""

    number: int = Field(description="1 for the first.", examples=[1])
    worker_id: UUID = Field(description="The worker process that ran it.")
    batch_id: UUID = Field(description="The admission batch it ran in.")
    claimed_at: datetime = Field(description="When the worker took the job.")
    started_at: datetime | None = Field(None, description="When the engine began the prompt.")
    ended_at: datetime | None = Field(None, description="When it ended; null while it runs.")
    outcome: AttemptOutcome | None = Field(None, description="How it ended; null while it runs.")
    charged: bool | None = Field(
        None, description="Whether it counts towards the most attempts; null while it runs."
    )
    device_seconds: float | None = Field(
        None, description="Device time of its answer, in seconds; 0 without one.", examples=[0.412]
    )
    wasted_seconds: float | None = Field(
        None, description="Device time that nobody pays: it brought no answer.", examples=[0.0]
    )
    cost: Money | None = Field(None, description="What it is billed.", examples=["0.000004120"])
    energy_j: float | None = Field(
        None, description="Joules of its answer; null where nothing is known.", examples=[31.5]
    )
    wasted_j: float | None = Field(
        None, description="Joules that brought no answer.", examples=[0.0]
    )
    energy_method: EnergyMethod | None = Field(
        None, description="How its joules are known; null while it runs."
    )
    error_code: str | None = Field(
        None, description="What ended it, if an error did.", examples=["engine_crash"]
    )


class Timing(BaseModel):
    """Where the time went, in milliseconds. A part that did not take place is null."""

    queue_ms: float | None = Field(description="Accepted to the engine's start.", examples=[104.2])
    batch_wait_ms: float | None = Field(
        description="The part of it in which the worker was filling the batch.", examples=[100.1]
    )
    ttft_ms: float | None = Field(description="Accepted to the first token.", examples=[180.5])
    inference_ms: float | None = Field(
        description="The engine's start to the last token.", examples=[512.7]
    )
    total_ms: float | None = Field(description="Accepted to finished.", examples=[640.3])


class TokenUsage(BaseModel):
    """Tokens, cached ones included."""

    input_tokens: int | None = Field(description="Tokens of the prompt.", examples=[31])
    cached_tokens: int = Field(
        description="Of these, found in the engine's prefix cache and not computed.", examples=[16]
    )
    output_tokens: int | None = Field(description="Tokens generated.", examples=[64])
    total_tokens: int | None = Field(description="Both.", examples=[95])


class Cost(BaseModel):
    """What the job costs: its share of the device's time, at the worker's price."""

    amount: Money | None = Field(
        description="An exact decimal, as a string: device_seconds at per_device_hour, and "
        "upstream. Null if the device has no price.",
        examples=["0.000005120"],
    )
    currency: str | None = Field(description="ISO 4217 code.", examples=["EUR"])
    price_id: str | None = Field(description="The entry of prices.toml.", examples=["cpu"])
    per_device_hour: Money | None = Field(
        description="The price of a device and hour.", examples=["0.036000000"]
    )
    upstream: Money | None = Field(
        description="The part of the amount that servers elsewhere asked for.", examples=[None]
    )
    charge: Money | None = Field(
        description="What its tokens cost by the tariff of that price; a figure of its own. Null "
        "without one.",
        examples=["0.000007000"],
    )
    device_seconds: float = Field(description="The time charged, in seconds.", examples=[0.512])
    wasted_seconds: float = Field(
        description="Time of the attempt that ended it that is not charged: it was spent again.",
        examples=[0.0],
    )


class Energy(BaseModel):
    """What the job took of the device's energy: by time, as its cost. See docs/books.md."""

    energy_j: float | None = Field(
        description="Of its answer, in joules; null where nothing is known.", examples=[31.5]
    )
    wasted_j: float | None = Field(
        description="Of the attempt that ended it, in joules, what brought no answer.",
        examples=[0.0],
    )
    energy_method: EnergyMethod = Field(
        description="measured by a counter; estimated, in part at least, by power times time; or "
        "absent."
    )
    energy_boundary: str | None = Field(
        description="Whose energy it is a part of: the gpu's (the whole board's), the host's cpu "
        "packages', or the device's as its power is configured.",
        examples=["gpu"],
    )
    carbon_g: float | None = Field(
        description="Grams of CO2-equivalent of energy_j; null where the intensity of the "
        "electricity is not configured.",
        examples=[0.0033],
    )


class Batch(BaseModel):
    """The admission batch that the job ran in."""

    id: UUID = Field(description="The batch's id; also in the table `batches`.")
    size: int | None = Field(description="Sequences in it.", examples=[16])
    close_reason: CloseReason = Field(
        description="Why it was closed: it was full (size, tokens), its oldest member had waited "
        "long enough (wait), or the engine had room (join)."
    )


class JobError(BaseModel):
    """Why a job has no answer."""

    code: str = Field(description="Stable, for programs.", examples=["context_length_exceeded"])
    message: str = Field(description="For people.", examples=["The deadline passed first."])


WhyUnknown = Annotated[
    Reason | None,
    Field(
        description="Why nobody can say: no worker that serves the model is up (no_worker), one "
        "loads it for the first time that is measured (loading), no job of the model has ended yet "
        "(no_history), or the queue could not be looked at lately (not_looked).",
        examples=[None],
    ),
]


class Eta(BaseModel):
    """When a job that waits will have ended, by what is measured now. It changes at each look."""

    p50: datetime | None = Field(description="As likely as not it has ended by then.")
    p90: datetime | None = Field(description="Nine of ten such jobs have ended by then.")
    reason: WhyUnknown
    load_s: float | None = Field(
        description="Where no worker that serves the model is up: what it takes to load, in "
        "seconds, as measured. `p50` and `p90` hold what is left of that.",
        examples=[None],
    )


class Links(BaseModel):
    """Paths of this job."""

    self: str = Field(description="This job.", examples=["/v1/jobs/0b9f…"])
    cancel: str | None = Field(
        None,
        description="Where to cancel it, while that is possible.",
        examples=["/v1/jobs/0b9f…/cancel"],
    )
    replay: str | None = Field(
        None,
        description="Where to run it once more, if it ended without an answer.",
        examples=["/v1/jobs/0b9f…/replay"],
    )


class JobSummary(BaseModel):
    """A job without its answer."""

    id: UUID = Field(description="The job's id, and that of its message.")
    object: Literal["job"] = Field("job", description="Always `job`.")
    state: JobState = Field(
        description="queued, running, or one of the final ones: completed, failed, cancelled, "
        "expired."
    )
    url: str | None = Field(description="Which call it is.", examples=["/v1/chat/completions"])
    kind: Kind = Field(description="What the model does.")
    model: str = Field(description="The model asked.", examples=["smollm2-135m-instruct"])
    priority: int = Field(description="0 is served first, 9 last; -1 is waited for.", examples=[0])
    replay_of: UUID | None = Field(description="The ended job that this one runs once more.")
    created_at: datetime = Field(description="When it was accepted.")
    not_before: datetime = Field(description="The earliest time to run it.")
    deadline: datetime | None = Field(description="When it expires if it is not finished.")
    queued_at: datetime = Field(description="When it last became queued.")
    claimed_at: datetime | None = Field(description="When a worker last claimed it.")
    started_at: datetime | None = Field(description="When the engine began the prompt.")
    first_token_at: datetime | None = Field(
        description="When the first token was there; for an embedding or scores, these."
    )
    finished_at: datetime | None = Field(description="When it reached its final state.")
    cancel_requested_at: datetime | None = Field(
        description="When it was asked to be cancelled while it ran."
    )
    purged_at: datetime | None = Field(
        description="When what it says was removed at the caller's word: its request, response, "
        "metadata and key."
    )
    position: int | None = Field(
        description="Its place among those that wait for its model, 1 for the next one; null once "
        "it runs, and while it is not due. Exact for the first hundred of a priority, beyond that "
        "within a hundredth.",
        examples=[12],
    )
    eta: Eta | None = Field(description="When it will have ended; null unless it is queued.")
    max_attempts: int = Field(description="Charged attempts after which it fails.", examples=[3])
    attempts: list[Attempt] = Field(description="Its tries, oldest first.")
    timing: Timing | None = Field(description="Where the time went; null until it is final.")
    usage: TokenUsage | None = Field(description="Tokens; null until it is final.")
    cost: Cost | None = Field(description="What it is charged; null until it is final.")
    energy: Energy | None = Field(description="The joules it took; null until it is final.")
    batch: Batch | None = Field(description="Its admission batch; null before it ran.")
    error: JobError | None = Field(description="Why it has no answer, or only a part of one.")
    metadata: dict[str, str] = Field(
        description="The texts it was submitted with.", examples=[{"customer": "42"}]
    )
    links: Links = Field(description="Where to go from here.")


class Job(JobSummary):
    """A job: its state, what it took, and its answer or error."""

    response: dict[str, Any] | None = Field(
        description="The body of the OpenAI-style answer. A cancelled or expired job keeps what "
        "was generated."
    )


class JobList(BaseModel):
    """One page of jobs, newest first."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[JobSummary] = Field(description="The jobs.")
    first_id: UUID | None = Field(description="The first job's id.")
    last_id: UUID | None = Field(description="The last job's id: `after` for the next page.")
    has_more: bool = Field(description="Whether there is a next page.", examples=[False])


class BulkRequest(BaseModel):
    """Jobs to submit in one transaction."""

    jobs: list[Submission] = Field(description="The jobs, up to 10,000.", min_length=1)


class BulkItem(BaseModel):
    """What became of one job of a bulk submission."""

    status: int = Field(
        description="202 for a job accepted, 200 for one known by its key, else the error's.",
        examples=[202],
    )
    id: UUID | None = Field(None, description="The job's id, unless it was refused.")
    location: str | None = Field(
        None, description="Where to follow the job.", examples=["/v1/jobs/0b9f…"]
    )
    error: Problem | None = Field(None, description="Why it was refused.")


class BulkAnswer(BaseModel):
    """One item for each job, in the order they were sent."""

    object: Literal["bulk"] = Field("bulk", description="Always `bulk`.")
    accepted: int = Field(
        description="Jobs stored, those known by their key included.", examples=[2]
    )
    refused: int = Field(description="Jobs not stored.", examples=[1])
    items: list[BulkItem] = Field(description="What became of each.")


class Model(BaseModel):
    """A model that jobs may name."""

    id: str = Field(description="Its name in requests.", examples=["smollm2-135m-instruct"])
    object: Literal["model"] = Field("model", description="Always `model`.")
    owned_by: Literal["gristmill"] = Field("gristmill", description="Always `gristmill`.")
    created: Literal[0] = Field(0, description="Always 0: it is not known.")
    kind: Kind = Field(description="What it does.")
    default: bool = Field(description="Whether it takes requests that name no model.")
    labels: list[str] = Field(
        description="Names of a classifier's classes, in the order of its scores.",
        examples=[["negative", "positive"]],
    )
    prompts: list[str] = Field(
        description="Names of an embedder's prompts, for `prompt_name`.", examples=[["query"]]
    )
    languages: list[str] = Field(
        description="A translator's target languages, for `target_language`; none if its files "
        "name none.",
        examples=[["deu_Latn", "fra_Latn"]],
    )
    context_tokens: int = Field(description="Most tokens of prompt and output.", examples=[8192])
    max_output_tokens: int = Field(description="Largest max_tokens taken.", examples=[4096])
    max_batch_size: int = Field(
        description="Most sequences of a batch, and of one request: prompts times n.",
        examples=[64],
    )
    max_batch_tokens: int = Field(description="Most tokens of a batch.", examples=[16384])


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[Model] = Field(description="The models.")


class AnthropicModel(BaseModel):
    """A model that messages may name, as Anthropic's clients read it."""

    type: Literal["model"] = Field("model", description="Always `model`.")
    id: str = Field(description="Its name in requests.", examples=["smollm2-135m-instruct"])
    display_name: str = Field(description="The same.", examples=["smollm2-135m-instruct"])
    created_at: datetime = Field(description="Always the beginning of 1970: it is not known.")
    lifecycle: Literal["active"] = Field("active", description="Always `active`.")
    max_input_tokens: int = Field(description="Most tokens of prompt and output.", examples=[8192])
    max_tokens: int = Field(description="Largest max_tokens taken.", examples=[4096])


class AnthropicModelList(BaseModel):
    """A page of models, as Anthropic's clients read it."""

    data: list[AnthropicModel] = Field(description="The models.")
    has_more: bool = Field(description="Whether there are more in this direction.")
    first_id: str | None = Field(description="The first of the page.")
    last_id: str | None = Field(description="The last of the page: `after_id` of the next.")


class QueueLimits(BaseModel):
    """How much may wait, and how much does."""

    max_jobs: int = Field(description="Jobs beyond which submissions are answered with 429.")
    max_tokens: int = Field(description="The same for their tokens: prompts and most output.")
    jobs: int = Field(description="Jobs that wait, as last counted.", examples=[120])
    tokens: int = Field(description="Their tokens.", examples=[48_000])


class Limits(BaseModel):
    """How much this API takes."""

    object: Literal["limits"] = Field("limits", description="Always `limits`.")
    max_body_bytes: int = Field(description="Largest body of one job.", examples=[2_000_000])
    max_parts: int = Field(
        description="Most texts, objects and lists of one job.", examples=[50_000]
    )
    max_bulk_bytes: int = Field(
        description="Largest body of a bulk submission.", examples=[64_000_000]
    )
    max_bulk_items: int = Field(description="Most jobs of a bulk submission.", examples=[10_000])
    max_ids: int = Field(description="Most ids of a bulk status or cancel.", examples=[1_000])
    max_ids_full: int = Field(description="Most ids of the view full.", examples=[100])
    max_page: int = Field(description="Most jobs of a list's page.", examples=[100])
    max_wait_s: float = Field(description="Longest long poll, in seconds.", examples=[60])
    max_long_polls: int = Field(description="Long polls that are held at once.", examples=[500])
    long_polls: int = Field(description="Long polls that are held now.", examples=[3])
    max_streams: int = Field(description="Listeners to the events of jobs at once.", examples=[500])
    streams: int = Field(description="Listeners to them now.", examples=[3])
    queue: QueueLimits = Field(description="The queue's own limits, and how full it is.")


class Check(BaseModel):
    """Whether one thing that the API needs is there."""

    ok: bool = Field(description="Whether it is.", examples=[True])
    detail: str | None = Field(None, description="What is wrong, and what to do.")


class Readiness(BaseModel):
    """Whether this API can take jobs."""

    status: Literal["ready", "degraded", "unavailable"] = Field(
        description="degraded: Redis is away; jobs are taken, and their messages are sent later."
    )
    checks: dict[str, Check] = Field(description="By name: postgres, schema, redis.")
