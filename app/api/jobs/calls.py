"""/v1/jobs: submit, follow, cancel, replay."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Path, Query, Request, Response

from app.api.answers import JSON, LOOK_AGAIN, Held, Hold, answer, look, look_at_new
from app.api.caller import Caller, Who
from app.api.idempotency import IdempotencyKey, parse_key
from app.api.jobs import quotes
from app.api.jobs.schemas_quotes import BulkQuote, Quote
from app.api.problems import documented
from app.api.schemas import BulkAnswer, BulkRequest, Job
from app.api.services import Here, Services
from app.api.views import bulk_item
from app.api.wire import raw_bodies
from app.api.wire.raw_bodies import json_body
from app.errors import GristmillError, RequestError, RequestTooLarge
from app.intake.submit import Stored, Submission
from app.jobs import JobState, job_id_of
from app.requests import json_text
from app.store import cancellation
from app.store.submissions import NewJob

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

PIECE_BYTES: Final = 64_000
"""Of a bulk: jobs that are checked in one turn, so that small submissions never wait for long."""


JobId = Annotated[
    str,
    Path(
        description="The job's id. Any other text is taken for the id of a Celery task.",
        examples=["0b9f1c5e-6c8f-4d3a-9a3f-0d9b7f2f6a11"],
    ),
]


_EXAMPLE: Final = {
    "body": {
        "messages": [{"role": "user", "content": "What is a grist mill?"}],
        "max_tokens": 64,
    },
    "metadata": {"customer": "42"},
}


SUBMISSION_ERRORS: Final = documented(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
DryRun = Annotated[
    bool,
    Query(
        description="Check the request and answer with 200 and a quote: what it would take, when "
        "it would have ended and what it would cost. Nothing is stored or sent.",
        examples=[True],
    ),
]
_OR_QUOTE: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "model": Job | Quote,
        "description": "The job is final already; with `dry_run`, the quote.",
    }
}
_OR_QUOTES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "model": BulkAnswer | BulkQuote,
        "description": "No job was accepted; with `dry_run`, the quotes.",
    }
}
_ALREADY_FINAL: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": Job, "description": "The job is final already."}
}
_REPLAYED_BEFORE: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": Job, "description": "It was replayed before, by this job."}
}


@router.post(
    "",
    status_code=202,
    response_model=Job,
    responses=_OR_QUOTE | SUBMISSION_ERRORS,
    openapi_extra=json_body(Submission, _EXAMPLE),
    summary="Submit a job",
    response_description="The job is accepted.",
)
async def submit(
    request: Request,
    here: Here,
    who: Who,
    hold: Held,
    idempotency_key: IdempotencyKey = None,
    dry_run: DryRun = False,
) -> Response:
    """Store the job and answer 202: from then on it is not lost. `Location` is where to follow it.

    A job that ends within the time it is waited for, or that its Idempotency-Key brings back
    final, is answered with 200. With `dry_run` it is checked as ever, and answered with a quote.
    """
    if dry_run:
        checked = await _checked_one(request, here, who, idempotency_key)
        return quotes.answer_of(await here.read(here.submitter.quote, [checked]))
    stored = await _store_one(request, here, who, idempotency_key)
    job = await look_at_new(here, who.tenant, stored, hold)
    headers = {"Location": f"/v1/jobs/{stored.only.job_id}"}
    return answer(job, status=200 if job.is_final else 202, hold=hold, headers=headers)


async def _store_one(request: Request, here: Services, who: Caller, key: str | None) -> Stored:
    try:
        stored = await here.writer.store(await _checked_one(request, here, who, key))
        created = stored.only.created
    except GristmillError:
        here.metrics.count_submissions("refused")
        raise
    here.metrics.count_submissions("accepted" if created else "replayed")
    return stored


async def _checked_one(request: Request, here: Services, who: Caller, key: str | None) -> NewJob:
    most = here.settings.api.max_body_bytes
    async with raw_bodies.body_of(request, most, here.room) as raw:
        await here.expect_room(1)
        return await here.work.run(len(raw), _check, here, who.tenant, raw, key)


def _check(here: Services, tenant: str, raw: bytearray, header: str | None) -> NewJob:
    value = raw_bodies.parse_json(raw)
    if header is not None and isinstance(value, dict):
        key = parse_key(header)
        if value.setdefault("idempotency_key", key) != key:
            raise RequestError(
                "The header Idempotency-Key and the field idempotency_key differ.",
                param="idempotency_key",
            )
    return here.submitter.check(value, tenant=tenant)


@router.post(
    "/bulk",
    status_code=202,
    response_model=BulkAnswer,
    responses=_OR_QUOTES | SUBMISSION_ERRORS,
    openapi_extra=json_body(BulkRequest, {"jobs": [_EXAMPLE]}),
    summary="Submit many jobs",
    response_description="At least one job is accepted.",
)
async def submit_bulk(request: Request, here: Here, who: Who, dry_run: DryRun = False) -> Response:
    """Store up to 10,000 jobs in one transaction, and answer for each in its place.

    The good ones are accepted beside the bad ones: 202 if there is any good one, else 200. Only
    what is wrong with the body as a whole, a full queue and an absent Postgres are errors here.
    With `dry_run` all are checked as ever, and answered with quotes, each as if those before it
    had been submitted.
    """
    most = here.settings.api.max_bulk_bytes
    async with raw_bodies.body_of(request, most, here.room) as raw, here.bulk_turn():
        checked = await _check_bulk(here, who.tenant, raw)
        raw.clear()  # Postgres may take as long again
        if dry_run:
            quoted = await here.read(here.submitter.quote, checked)
            return await here.tellers.begin(partial(quotes.bulk_answer_of, quoted))
        stored = await here.write(here.submitter.store, checked)
        await here.send(stored)
        return await here.tellers.begin(partial(_bulk_answer, here, stored))


async def _check_bulk(here: Services, tenant: str, raw: bytearray) -> list[NewJob | RequestError]:
    """Piece by piece, so that others have their turns, and of the values few are there at once."""
    limit = here.settings.api.max_bulk_items
    items = await here.work.run(len(raw), json_text.items_of, raw, "jobs", limit)
    if not items:
        raise RequestError(
            f'The body must be {{"jobs": [...]}} with 1 to {limit} jobs and nothing else.',
            param="jobs",
        )
    await here.expect_room(len(items))
    checked: list[NewJob | RequestError] = []
    for piece in pieces_of(items):
        size = piece[-1].stop - piece[0].start
        checked += await here.work.run(size, _check_piece, here, tenant, raw, piece, len(checked))
    return checked


def pieces_of(items: list[slice]) -> Iterator[list[slice]]:
    piece: list[slice] = []
    for item in items:
        if piece and item.stop - piece[0].start > PIECE_BYTES:
            yield piece
            piece = []
        piece.append(item)
    yield piece


def _check_piece(
    here: Services, tenant: str, raw: bytearray, piece: list[slice], index: int
) -> list[NewJob | RequestError]:
    return [_check_item(here, tenant, raw[item], place) for place, item in enumerate(piece, index)]


def _check_item(here: Services, tenant: str, raw: bytearray, index: int) -> NewJob | RequestError:
    most = here.settings.api.max_body_bytes
    if len(raw) > most:
        return RequestTooLarge(f"The job is larger than {most} bytes.", param="body")
    value = raw_bodies.parse_json(raw, f"jobs.{index}")
    try:
        return here.submitter.check(value, tenant=tenant)
    except RequestError as error:
        error.__context__ = None  # what led to it holds the values, and so do its frames
        return error.with_traceback(None)


def _bulk_answer(here: Services, stored: Stored) -> Response:
    items = [bulk_item(index, outcome) for index, outcome in enumerate(stored.outcomes)]
    refused = sum(item.error is not None for item in items)
    replayed = sum(item.status == HTTPStatus.OK for item in items)
    accepted = len(items) - refused
    here.metrics.count_submissions("accepted", accepted - replayed)
    here.metrics.count_submissions("replayed", replayed)
    here.metrics.count_submissions("refused", refused)
    bulk = BulkAnswer(accepted=accepted, refused=refused, items=items)
    body = bulk.model_dump_json(exclude_none=True)
    return Response(body, 202 if accepted else 200, LOOK_AGAIN if accepted else {}, media_type=JSON)


@router.get(
    "/{job_id}",
    response_model=Job,
    responses=documented(
        HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE
    )
    | {304: {"description": "Nothing changed since the ETag in If-None-Match."}},
    summary="Follow a job",
    response_description="The job.",
)
async def get_job(
    here: Here,
    who: Who,
    job_id: JobId,
    hold: Held,
    if_none_match: Annotated[
        str | None, Header(description="An ETag of an earlier answer: 304 if nothing changed.")
    ] = None,
) -> Response:
    """The job as it is, or, with `wait`, as soon as it is final.

    While it is not, `Retry-After` says when to look again.
    """
    job = await look(here, who.tenant, job_id_of(job_id), hold)
    return answer(job, hold=hold, if_none_match=if_none_match)


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    response_model=Job,
    responses=_ALREADY_FINAL
    | documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.SERVICE_UNAVAILABLE),
    summary="Cancel a job",
    response_description="The job is running; its worker is asked to stop it.",
)
async def cancel(here: Here, who: Who, job_id: JobId) -> Response:
    """A queued job is cancelled at once: 200. A running one is stopped by its worker within a step
    or so, and what it generated is kept: 202, follow it. May be repeated."""
    state = await here.commit(cancellation.cancel, job_id_of(job_id), tenant=who.tenant)
    await here.tell_workers([job_id_of(job_id)] if state is JobState.RUNNING else [])
    job = await here.job(who.tenant, job_id_of(job_id))
    return answer(job, status=200 if job.is_final else 202)


@router.post(
    "/{job_id}/replay",
    status_code=202,
    response_model=Job,
    responses=_REPLAYED_BEFORE
    | documented(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT,
        HTTPStatus.GONE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ),
    summary="Replay a job",
    response_description="The new job is accepted.",
)
async def replay(here: Here, who: Who, job_id: JobId) -> Response:
    """Run a job that failed, expired or was cancelled once more: as a new job, which says so in
    `replay_of`. May be repeated: one job is replayed once, and the same new job is answered."""
    stored = await here.write(here.submitter.store_replay, job_id_of(job_id), tenant=who.tenant)
    here.metrics.count_submissions("accepted" if stored.only.created else "replayed")
    await here.send(stored)
    submitted = stored.only
    job = await look_at_new(here, who.tenant, stored, Hold(0.0, False))
    headers = {"Location": f"/v1/jobs/{submitted.job_id}"}
    return answer(job, status=202 if submitted.created else 200, headers=headers)
