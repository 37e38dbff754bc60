"""GET /v1/usage: what jobs used and cost, summed."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal
from zoneinfo import ZoneInfo

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field

from app.api.caller import Caller, Who
from app.api.problems import documented
from app.api.schemas import ModelName, Money
from app.api.services import Here, Services
from app.api.wire import query
from app.books.energy import EnergyMethod
from app.books.usage import (
    MAX_TOP,
    PARTS,
    Answer,
    DeviceTime,
    Question,
    Usage,
    halves_of,
    parse_by,
    period_of,
    zone_of,
)
from app.errors import NotStorable, RequestError
from app.jobs import MAX_PRIORITY, JobState
from app.keys import Scope
from app.requests.storable import parse_metadata, refuse_unstorable
from app.store import usage
from app.store.tenancy import EVERYBODY, acting_for
from app.store.translation import TookTooLong

NS_PER_S: Final = 1_000_000_000
NJ_PER_J: Final = 1_000_000_000
UG_PER_G: Final = 1_000_000

router = APIRouter(prefix="/v1/usage", tags=["usage"])


class UsageRow(BaseModel):
    """What the jobs of one group used, in one currency."""

    group: dict[str, str | int | datetime | None] = Field(
        description="Its keys, as `by` names them; null where a job has none.",
        examples=[{"day": "2027-01-31T00:00:00Z", "model": "smollm2-135m-instruct"}],
    )
    rest: bool = Field(description="Whether it is all groups beyond `top`, as one.")
    jobs: dict[JobState, int] = Field(
        description="Jobs that ended, by their final state.", examples=[{"completed": 120}]
    )
    input_tokens: int = Field(
        description="Tokens of prompts, cached ones included (OpenAI's convention).",
        examples=[31_000],
    )
    cached_tokens: int = Field(
        description="Of these, found in a prefix cache and not computed.", examples=[16_000]
    )
    output_tokens: int = Field(description="Tokens generated.", examples=[64_000])
    device_seconds: float = Field(description="Device time billed, in seconds.", examples=[512.25])
    wasted_seconds: float = Field(
        description="Device time of their last attempts that nobody pays.", examples=[0.0]
    )
    currency: str | None = Field(
        description="ISO 4217 code; null if none of these jobs ever ran.", examples=["EUR"]
    )
    cost: Money = Field(
        description="What they were charged, an exact decimal.", examples=["0.005120000"]
    )
    upstream_cost: Money = Field(
        description="Of it, what servers elsewhere asked for.", examples=["0"]
    )
    price_per_hour: Money | None = Field(
        description="Of a device, where groups are by price.", examples=["2.900000000"]
    )
    cost_per_million_tokens: Money | None = Field(
        description="Of that, for a million tokens, input and output together: what they cost on a "
        "device that is never idle.",
        examples=["0.053894737"],
    )
    cost_per_million_tokens_real: Money | None = Field(
        description="The same with what devices cost beside: loading, idling, waste and overhead, "
        "spread over all jobs of the time and currency by their cost.",
        examples=["0.081320442"],
    )
    charge: Money = Field(
        description="What their tokens cost by the price's tariff; 0 without one.", examples=["0"]
    )
    energy_joules: float | None = Field(
        description="Energy of their answers, as far as it is known.", examples=[1280.5]
    )
    energy_method: EnergyMethod = Field(
        description="How that is known: measured, estimated in part at least, or absent."
    )
    energy_jobs: int = Field(description="Jobs whose energy is known.", examples=[120])
    wasted_joules: float | None = Field(
        description="Energy of their last attempts that brought no answer.", examples=[0.0]
    )
    carbon_grams: float | None = Field(
        description="CO2-equivalent of that energy, where its intensity is set.", examples=[0.11]
    )
    mean_batch_size: float | None = Field(
        description="Jobs of the batch that a job was in, itself included.", examples=[12.5]
    )
    mean_batch_sequences: float | None = Field(
        description="Sequences of a batch; null where groups are others than of time and model: a "
        "batch may mix them.",
        examples=[14.0],
    )
    padding_share: float | None = Field(
        description="Of the token positions that batches computed, the part that nobody asked for; "
        "null in the same cases.",
        examples=[0.02],
    )


class DeviceRow(BaseModel):
    """Where the time of devices of one name and price went, whichever jobs are asked for."""

    time: datetime | None = Field(description="Begin of the hour, day or month, if by one.")
    device: str = Field(description="As its driver names it.", examples=["NVIDIA H100"])
    price_id: str | None = Field(description="Its price; null if it has none.", examples=["h100"])
    currency: str | None = Field(description="ISO 4217 code of the price.", examples=["EUR"])
    price_per_hour: Money | None = Field(description="For a device.", examples=["2.900000000"])
    seconds: dict[str, float] = Field(
        description="`up`, and its parts: `load` (models), `busy` (billed to jobs), `idle`, "
        "`waste`, `overhead` (between steps) and `open` (computed for jobs settled later).",
        examples=[{"up": 3600.0, "busy": 2412.5}],
    )
    cost: dict[str, Money] | None = Field(
        description="What each costs; null without a price.", examples=[{"up": "2.900000000"}]
    )
    energy_joules: dict[str, float] | None = Field(
        description="What each drew, `up` all together; null where nothing is known.",
        examples=[{"up": 1_260_000.0, "idle": 71_250.0}],
    )


class UsageAnswer(BaseModel):
    """Usage of a period."""

    object: Literal["usage"] = Field("usage", description="Always `usage`.")
    since: datetime = Field(description="Begin of the period: jobs that ended then or later.")
    until: datetime = Field(description="Its end: jobs that ended before.")
    zone: str = Field(description="Whose days and months are told.", examples=["UTC"])
    by: list[str] = Field(description="Keys of the groups.", examples=[["day", "model"]])
    data: list[UsageRow] = Field(
        description="By time; then the groups with the most device time first."
    )
    devices: list[DeviceRow] = Field(description="Where the time of all devices went, by time.")


async def _question(
    request: Request,
    here: Here,
    who: Who,
    by: Annotated[
        str,
        Query(
            max_length=1_000,
            description="Keys of the groups, with commas between: one of `hour`, `day` and "
            "`month`; `model`, `tenant`, `priority`, `price`, `metadata.KEY`. Empty: one sum.",
            examples=["day,model", "metadata.customer"],
        ),
    ] = "day",
    since: Annotated[
        datetime | None,
        Query(
            description="Only jobs that ended at or after this full hour (RFC 3339, with its "
            "zone); else since 30 days.",
            examples=["2027-01-31T00:00:00Z"],
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        Query(
            description="Only jobs that ended before this full hour (RFC 3339, with its zone).",
            examples=["2027-02-01T00:00:00Z"],
        ),
    ] = None,
    zone: Annotated[
        str,
        Query(
            max_length=100,
            description="Whose days and months they are; whole hours away from UTC.",
            examples=["Europe/Berlin"],
        ),
    ] = "UTC",
    top: Annotated[
        int,
        Query(
            ge=1,
            le=MAX_TOP,
            description="Groups that are told apart, those with the most device time in the "
            "period; all others are one.",
        ),
    ] = 50,
    model: Annotated[ModelName | None, Query(description="Only jobs of this model.")] = None,
    tenant: Annotated[
        str | None,
        Query(
            max_length=200,
            description="Only jobs of this tenant; without the scope `admin` it is your own.",
        ),
    ] = None,
    priority: Annotated[
        int | None, Query(ge=0, le=MAX_PRIORITY, description="Only jobs of this priority.")
    ] = None,
) -> Question:
    """What is asked for."""
    refuse_unstorable(tenant, "tenant")
    begin, end = period_of(since, until, await here.read(here.database.now), zone)
    question = Question(
        since=begin,
        until=end,
        by=parse_by(by),
        zone=zone,
        top=top,
        model=model,
        tenant=_whose(who, tenant),
        priority=priority,
        metadata=parse_metadata(query.members_of("metadata", request)),
    )
    for label in question.labels:
        refuse_unstorable(label, "by")
    zone_of(zone, *(halves_of(begin, end) if question.span else ()))
    return question


def _whose(who: Caller, asked: str | None) -> str | None:
    """Whose usage is told; None is all tenants', which only an admin sees."""
    if Scope.ADMIN not in who.scopes:
        if asked not in (None, who.tenant):
            who.need(Scope.ADMIN)
        return who.tenant
    return asked


_METADATA: Final = query.family(
    "metadata",
    "Only jobs with these pairs among their metadata: `metadata[KEY]=VALUE`.",
    {"customer": "42"},
)


@router.get(
    "",
    responses=documented(HTTPStatus.BAD_REQUEST, HTTPStatus.SERVICE_UNAVAILABLE),
    openapi_extra={"parameters": [_METADATA]},
    summary="Sum up usage",
    response_description="One row for each group and currency.",
)
async def tell_usage(
    here: Here, who: Who, question: Annotated[Question, Depends(_question)]
) -> UsageAnswer:
    """What jobs that ended in a period used and cost, by time, model, tenant, priority, price or
    what their metadata says. Sums stay when jobs are deleted; what metadata says goes with them.

    A key without the scope `admin` is told of its own tenant alone, and not of devices."""
    sees_all = Scope.ADMIN in who.scopes
    answer = await here.read(_ask, here, question, EVERYBODY if sees_all else who.tenant)
    return UsageAnswer(
        since=question.since,
        until=question.until,
        zone=question.zone,
        by=list(question.by),
        data=[_row(question, row, sees_all) for row in answer.rows],
        devices=[_device(question, device) for device in answer.devices] if sees_all else [],
    )


def _ask(here: Services, question: Question, whose: str) -> Answer:
    try:
        with acting_for(whose), here.database.begin() as connection:
            return usage.ask(connection, question)
    except TookTooLong:
        raise RequestError(
            "This takes Postgres longer than database.statement_timeout_ms: ask for a shorter "
            "period, or for one model.",
            param="since",
        ) from None
    except NotStorable:  # the one value that only Postgres can judge
        raise RequestError("Postgres knows no time zone of this name.", param="zone") from None


def _row(question: Question, row: Usage, sees_all: bool) -> UsageRow:
    group: dict[str, Any] = {
        key: _local(value, question) if isinstance(value, datetime) else value
        for key, value in row.group.items()
    }
    return UsageRow(
        group=group,
        rest=row.is_rest,
        jobs=dict(row.jobs),
        input_tokens=row.input_tokens,
        cached_tokens=row.cached_tokens,
        output_tokens=row.output_tokens,
        device_seconds=row.device_ns / NS_PER_S,
        wasted_seconds=row.wasted_ns / NS_PER_S,
        currency=row.currency,
        cost=row.cost,
        upstream_cost=row.upstream_cost,
        price_per_hour=row.price,
        cost_per_million_tokens=row.cost_per_million_tokens,
        cost_per_million_tokens_real=row.real_cost_per_million_tokens if sees_all else None,
        charge=row.charge,
        energy_joules=row.energy_nj / NJ_PER_J if row.jobs_with_energy else None,
        energy_method=row.energy_method,
        energy_jobs=row.jobs_with_energy,
        wasted_joules=row.wasted_nj / NJ_PER_J if row.jobs_with_energy else None,
        carbon_grams=row.carbon_ug / UG_PER_G or None,
        mean_batch_size=row.mean_batch_size,
        mean_batch_sequences=row.filling and row.filling.mean_sequences,
        padding_share=row.filling and row.filling.padding_share,
    )


def _device(question: Question, device: DeviceTime) -> DeviceRow:
    parts = ("up", *PARTS)
    return DeviceRow(
        time=device.time and _local(device.time, question),
        device=device.device,
        price_id=device.price_id,
        currency=device.currency,
        price_per_hour=device.price,
        seconds={part: device.ns(part) / NS_PER_S for part in parts},
        cost=None
        if device.price is None
        else {part: device.cost(part) or Decimal(0) for part in parts},
        energy_joules={part: device.nj(part) / NJ_PER_J for part in parts}
        if any(map(device.nj, parts))
        else None,
    )


def _local(time: datetime, question: Question) -> datetime:
    return time.astimezone(ZoneInfo(question.zone))
