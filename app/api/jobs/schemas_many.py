"""What the calls for many jobs take and answer, field by field."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from app.api.envelopes import Problem
from app.api.schemas import Job, JobSummary, ModelName
from app.errors import RequestError
from app.intake.submit import Moment
from app.jobs import JobState
from app.requests.handling import Whole
from app.requests.part import Part
from app.requests.storable import parse_metadata

MAX_IDS: Final = 1_000
"""Of one call."""
MAX_IDS_FULL: Final = 100
"""The same where the answers come with it."""
MAX_GATHER_S: Final = 10.0
View = Literal["state", "summary", "full", "ended"]
WaitFor = Literal["all", "any"]
Ids = Annotated[
    list[str],
    Field(
        min_length=1,
        max_length=MAX_IDS,
        fail_fast=True,
        description="Ids of jobs; any other text is taken for the id of a Celery task.",
        examples=[["0b9f1c5e-6c8f-4d3a-9a3f-0d9b7f2f6a11"]],
    ),
]


class StatusRequest(Part):
    """Which jobs to follow, and how much of each."""

    ids: Ids
    view: View = Field(
        "summary",
        description="state: the states alone. summary: jobs without their answers. full: with "
        "them, for up to 100 ids. ended: the states, and the first 100 of those that are final "
        "with their answers.",
        examples=["full"],
    )
    wait_for: WaitFor = Field(
        "all",
        description="With the parameter wait: until all of them are final, or any.",
        examples=["any"],
    )
    gather_s: float = Field(
        0.0,
        ge=0,
        le=MAX_GATHER_S,
        description="With the parameter wait: for so many seconds the answer waits for all of "
        "them, and only then for any, so that one answer tells of many.",
        examples=[1.0],
    )

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        if self.view == "full" and len(self.ids) > MAX_IDS_FULL:
            raise RequestError(f"The view full takes up to {MAX_IDS_FULL} ids.", param="ids")
        return self


class StatusItem(BaseModel):
    """One job as it is."""

    status: int = Field(description="200, or the error's.", examples=[200])
    id: UUID = Field(description="The job's id.")
    state: JobState | None = Field(None, description="Its state, unless there is an error.")
    job: JobSummary | Job | None = Field(
        None,
        description="The job, if the view has it. Left out, too, once the answer has 16 MB: ask "
        "for it again.",
    )
    error: Problem | None = Field(None, description="Why it cannot be told of.")


class BulkStatus(BaseModel):
    """One item for each id, in the order they were sent."""

    object: Literal["bulk_status"] = Field("bulk_status", description="Always `bulk_status`.")
    is_final: bool = Field(description="Whether all that exist are final.", examples=[True])
    items: list[StatusItem] = Field(description="The jobs.")


class CancelFilter(Part):
    """Which open jobs to cancel: those that pass all that is given."""

    state: Literal["queued", "running"] | None = Field(
        None, description="Only those in this state; left out, both.", examples=["queued"]
    )
    model: ModelName | None = Field(
        None, description="Only those of this model.", examples=["all-minilm-l6-v2"]
    )
    metadata: Annotated[dict[str, str], BeforeValidator(parse_metadata)] = Field(
        default_factory=dict,
        description="Only those with these pairs among their metadata.",
        examples=[{"customer": "42"}],
    )
    since: Moment | None = Field(
        None,
        description="Only those accepted at or after this time (RFC 3339).",
        examples=["2027-01-31T12:00:00Z"],
    )
    until: Moment | None = Field(
        None,
        description="Only those accepted before this time (RFC 3339).",
        examples=["2027-01-31T18:00:00Z"],
    )

    @model_validator(mode="after")
    def _check_not_empty(self) -> Self:
        if self == CancelFilter.model_construct():
            raise RequestError(
                'A filter names at least one thing; {"state": "queued"} is all that wait.',
                param="filter",
            )
        return self


class CancelRequest(Part):
    """Which jobs to cancel: `ids` or a `filter`."""

    ids: Ids | None = Field(None, description="Cancel these, in place of a filter.")
    filter: CancelFilter | None = Field(
        None,
        description="Cancel what passes this, in place of ids.",
        examples=[{"metadata": {"customer": "42"}}],
    )
    limit: Annotated[Whole, Field(ge=1, le=MAX_IDS)] = Field(
        MAX_IDS, description="Most jobs that a filter cancels with one call.", examples=[1000]
    )

    @model_validator(mode="after")
    def _check_one_of_two(self) -> Self:
        if (self.ids is None) == (self.filter is None):
            raise RequestError("Give either ids or a filter.", param="ids")
        return self


class CancelItem(BaseModel):
    """What became of one job."""

    status: int = Field(
        description="200 for a job that is cancelled, 202 for one that its worker is asked to "
        "stop, else the error's.",
        examples=[200],
    )
    id: UUID = Field(description="The job's id.")
    state: JobState | None = Field(None, description="Its state, if it exists.")
    error: Problem | None = Field(None, description="Why it was not cancelled.")


class BulkCancel(BaseModel):
    """One item for each job, in the order of the ids, or newest first."""

    object: Literal["bulk_cancel"] = Field("bulk_cancel", description="Always `bulk_cancel`.")
    cancelled: int = Field(description="Jobs that are cancelled.", examples=[2])
    stopping: int = Field(description="Running jobs whose workers are asked.", examples=[1])
    refused: int = Field(description="Items with an error.", examples=[0])
    has_more: bool = Field(
        description="Whether more may pass the filter: send it again.", examples=[False]
    )
    items: list[CancelItem] = Field(description="What became of each.")
