"""Batches as OpenAI's clients know them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

_WHEN = "When it became so, in Unix time; null if it did not."


class BatchBody(BaseModel):
    """What a batch is asked with."""

    input_file_id: str | None = Field(
        None, description="A file with a request in each line.", examples=["file-0199e0a4f4a97c53"]
    )
    requests: list[dict[str, Any]] | None = Field(
        None,
        description="In place of a file: the requests, each with `body` and, if wanted, "
        "`custom_id`.",
    )
    endpoint: str = Field(
        description="The call that all of them are.", examples=["/v1/chat/completions"]
    )
    completion_window: Literal["24h"] = Field(
        "24h", description="Always `24h`: the setting `job_batches.window_s`.", examples=["24h"]
    )
    metadata: dict[str, str] | None = Field(
        None, description="Up to 16 texts of your own.", examples=[{"customer": "42"}]
    )
    output_expires_after: dict[str, Any] | None = Field(
        None,
        description="How long its files are kept.",
        examples=[{"anchor": "created_at", "seconds": 86400}],
    )
    webhook_url: str | None = Field(
        None,
        description="Where to tell of the batch's end, by a signed POST.",
        examples=["https://example.com/hooks/gristmill"],
    )
    idempotency_key: str | None = Field(
        None,
        description="The same key and request once more are the same batch; the header "
        "Idempotency-Key does the same.",
        examples=["nightly-2027-01-31"],
    )


class BatchError(BaseModel):
    """What is wrong with a line."""

    code: str | None = Field(None, description="The kind of problem, for programs.")
    line: int | None = Field(None, description="The row in the file, from 1; null: not of a row.")
    message: str | None = Field(None, description="The problem, for people.")
    param: str | None = Field(None, description="The field that is wrong.")


class BatchErrors(BaseModel):
    """Why a batch failed."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[BatchError] = Field(description="One for each wrong line.")


class RequestCounts(BaseModel):
    """How far a batch is."""

    total: int = Field(description="Its requests; 0 until they are read.")
    completed: int = Field(description="Those with an answer.")
    failed: int = Field(description="Those that ended without one.")


class InputDetails(BaseModel):
    """More of the tokens of prompts."""

    cached_tokens: int = Field(description="Those that were in a prefix cache.")


class OutputDetails(BaseModel):
    """More of the tokens of answers."""

    reasoning_tokens: int = Field(0, description="Always 0: they are not told apart.")


class BatchUsage(BaseModel):
    """Tokens of its requests that have ended."""

    input_tokens: int = Field(description="Of prompts.")
    input_tokens_details: InputDetails = Field(description="More of these.")
    output_tokens: int = Field(description="Of answers.")
    output_tokens_details: OutputDetails = Field(description="More of these.")
    total_tokens: int = Field(description="Their sum.")


class Batch(BaseModel):
    """A batch."""

    id: str = Field(description="Its id.", examples=["batch_0199e0a4f4a97c53a7b3a9f5d8f6d2ce"])
    object: Literal["batch"] = Field("batch", description="Always `batch`.")
    endpoint: str = Field(description="The call that its requests are.")
    model: str | None = Field(None, description="Their model; null if they name several.")
    errors: BatchErrors | None = Field(None, description="Why it failed, if it did.")
    input_file_id: str = Field(description="The file with its requests.")
    completion_window: str = Field(description="Always `24h`.")
    status: str = Field(
        description="validating, failed, in_progress, finalizing, completed, expired, cancelling "
        "or cancelled."
    )
    output_file_id: str | None = Field(
        None, description="The file with answers; it can be read while it grows."
    )
    error_file_id: str | None = Field(None, description="The file with requests without one.")
    created_at: int = Field(description="When it was accepted, in Unix time.")
    in_progress_at: int | None = Field(None, description=_WHEN)
    expires_at: int | None = Field(None, description="When what is open in it expires.")
    finalizing_at: int | None = Field(None, description=_WHEN)
    completed_at: int | None = Field(None, description=_WHEN)
    failed_at: int | None = Field(None, description=_WHEN)
    expired_at: int | None = Field(None, description=_WHEN)
    cancelling_at: int | None = Field(None, description=_WHEN)
    cancelled_at: int | None = Field(None, description=_WHEN)
    request_counts: RequestCounts = Field(description="How far it is.")
    usage: BatchUsage = Field(description="What its requests took so far.")
    metadata: dict[str, str] | None = Field(None, description="Texts of the caller.")


class BatchList(BaseModel):
    """A page of batches."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[Batch] = Field(description="The batches, newest first.")
    first_id: str | None = Field(None, description="Id of the first.")
    last_id: str | None = Field(None, description="Id of the last: the next page's `after`.")
    has_more: bool = Field(description="Whether there are more behind it.")
