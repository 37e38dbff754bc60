"""/v1/files: what callers upload, and what batches write.

https://platform.openai.com/docs/api-reference/files
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from http import HTTPStatus
from pathlib import PurePath
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.api.caller import Caller, Who
from app.api.envelopes import Door
from app.api.not_served import openai_alone
from app.api.openai.schemas_files import DeletedFile, FileList, FileObject
from app.api.pages import page_of
from app.api.problems import documented
from app.api.services import Here, Services
from app.api.wire.form import Form
from app.api.wire.pieces import begun
from app.api.wire.uploads import arriving
from app.batches import LineFile
from app.config.settings import FilesSettings
from app.errors import RequestError, RequestTooLarge
from app.files import UPLOADED, FileState, Purpose, id_in, key_of, name_of
from app.intake.batches import output_file
from app.jobs import new_id
from app.requests.part import printable
from app.store import files, job_batches
from app.store.files import FileView

router = APIRouter(prefix="/v1/files", tags=["files"], dependencies=[Depends(openai_alone)])

MIN_EXPIRY_S: Final = 3_600
MAX_EXPIRY_S: Final = 2_592_000

FileId = Annotated[str, Path(description="The file's id.", examples=["file-0199e0a4f4a97c53"])]

_ERRORS: Final = documented(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.SERVICE_UNAVAILABLE,
    door=Door.OPENAI,
)
_FORM: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "The file, with its name.",
                        },
                        "purpose": {
                            "type": "string",
                            "enum": list(UPLOADED),
                            "description": "What it is for.",
                        },
                        "expires_after[anchor]": {
                            "type": "string",
                            "enum": ["created_at"],
                            "description": "What `expires_after[seconds]` count from.",
                        },
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": MIN_EXPIRY_S,
                            "maximum": MAX_EXPIRY_S,
                            "description": "How long the file is kept; without it, one for a "
                            "batch is kept for `files.keep_days`, others until they are deleted.",
                        },
                    },
                }
            }
        },
    }
}


@router.post(
    "",
    response_model=FileObject,
    responses=documented(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.SERVICE_UNAVAILABLE,
        door=Door.OPENAI,
    ),
    openapi_extra=_FORM,
    summary="Upload a file",
    response_description="The file.",
)
async def create(request: Request, here: Here, who: Who) -> FileObject:
    """Store a file as it arrives. It is there once this is answered, and not before."""
    form = Form(request.headers.get("content-type", ""))
    limits = here.settings.files
    async with here.uploads.turn(), arriving(request) as body:
        stored = await store(here, who.tenant, Upload(form, body, limits))
    return object_of(stored)


async def store(here: Services, tenant: str, upload: Upload) -> FileView:
    """Write the bytes of an upload, and then say that they are there."""
    file_id = new_id()
    unknown: Any = {"purpose": Purpose.USER_DATA, "filename": "file"}  # until they have arrived
    await here.commit(files.begin, file_id, tenant=tenant, **unknown)
    digest = hashlib.sha256()
    try:
        async with here.objects.writing_async(key_of(file_id)) as writer:
            async for piece in upload.pieces():
                digest.update(piece)
                await writer.write(piece)
        return await here.commit(
            files.ready,
            file_id,
            num_bytes=upload.num_bytes,
            sha256=digest.hexdigest(),
            purpose=upload.purpose,
            filename=upload.filename,
            expires_s=upload.expires_s,
        )
    except BaseException:
        here.later(here.commit(files.give_up, file_id))
        raise


class Upload:
    """A form that arrives: the file's bytes, and what was said of it."""

    def __init__(self, form: Form, body: AsyncIterator[bytes], limits: FilesSettings) -> None:
        self._form = form
        self._body = body
        self._limits = limits
        self.num_bytes = 0

    async def pieces(self) -> AsyncIterator[bytes]:
        """The bytes. Raises `RequestError` for what is wrong with any of the form, at its end at
        the latest, so that nothing of it is kept."""
        async for data in self._body:
            for piece in self._form.feed(data):
                self.num_bytes += len(piece)
                self._check_size()
                yield piece
        self._form.finish()
        self._check_size()
        _ = self.purpose, self.expires_s  # both right
        suffix = PurePath(self.filename).suffix.lower()  # bytes without a name come as "upload"
        if self.purpose is Purpose.BATCH and suffix not in ("", ".jsonl"):
            raise RequestError("Invalid file format for Batch API. Must be .jsonl")

    def _check_size(self) -> None:
        is_batch = self._form.fields.get("purpose") == Purpose.BATCH
        most = self._limits.max_batch_bytes if is_batch else self._limits.max_bytes
        if self.num_bytes > most:
            raise RequestTooLarge(f"The file is larger than {most} bytes.", param="file")

    @property
    def filename(self) -> str:
        assert self._form.filename is not None
        return self._form.filename

    @property
    def purpose(self) -> Purpose:
        given = self._form.fields.get("purpose")
        if given is None:
            raise RequestError("Missing required parameter: 'purpose'.", param="purpose")
        if given not in UPLOADED:
            raise RequestError(f"'purpose' must be one of: {', '.join(UPLOADED)}.", param="purpose")
        return Purpose(given)

    @property
    def expires_s(self) -> float | None:
        given = expires_after(self._form.fields)
        return given if given or self.purpose is not Purpose.BATCH else self._limits.keep_s


def expires_after(fields: Mapping[str, str]) -> float | None:
    """What the form says of it. Raises `RequestError`."""
    anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise RequestError(
            "'expires_after[anchor]' must be created_at.", param="expires_after[anchor]"
        )
    if (
        seconds is None
        or not re.fullmatch(r"[0-9]{1,10}", seconds)
        or not MIN_EXPIRY_S <= int(seconds) <= MAX_EXPIRY_S
    ):
        raise RequestError(
            f"'expires_after[seconds]' must be from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}.",
            param="expires_after[seconds]",
        )
    return float(seconds)


@router.get("", responses=_ERRORS, summary="List files", response_description="One page of files.")
async def list_files(
    here: Here,
    who: Who,
    purpose: Annotated[str | None, Query(description="Only files for this.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Most files of a page.")] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query(description="Oldest or newest first.")] = "desc",
    after: Annotated[
        str | None, Query(max_length=255, description="Begin after this file: the last seen.")
    ] = None,
) -> FileList:
    """Files that are there, newest first if not said otherwise."""
    asked = Purpose(purpose) if purpose in tuple(Purpose) else None
    begin = id_in(after) if after else None
    if after and begin is None:
        raise RequestError("'after' must be the id of a file.", param="after")
    if purpose and asked is None:
        return FileList(data=[], has_more=False)

    page = await here.query(
        files.listed,
        tenant=who.tenant,
        purpose=asked,
        after=begin,
        newest_first=order == "desc",
        limit=limit + 1,
    )
    return FileList(**page_of(page, limit, object_of))


@router.get(
    "/{file_id}", responses=_ERRORS, summary="Retrieve a file", response_description="The file."
)
async def retrieve(here: Here, who: Who, file_id: FileId) -> FileObject:
    """What is known of the file."""
    return object_of(await _find(here, who, file_id))


@router.get(
    "/{file_id}/content",
    response_class=StreamingResponse,
    responses=_ERRORS
    | {200: {"content": {"application/octet-stream": {}}, "description": "The bytes."}},
    summary="Download a file",
)
async def content(
    here: Here,
    who: Who,
    file_id: FileId,
    offset: Annotated[
        int, Query(ge=0, description="Leave out so many lines at the beginning.")
    ] = 0,
) -> Response:
    """The bytes of the file. What a batch writes can be read while it grows: `X-Incomplete` says
    whether it does, `X-Last-Line` how many lines there are, the next call's `offset`."""
    view = await _find(here, who, file_id)
    headers = {"Cache-Control": "private, no-cache"}
    batch = (
        await here.query(job_batches.writing, view.batch_id, tenant=view.tenant)
        if view.batch_id
        else None
    )
    if batch is not None:
        file = LineFile.OUTPUT if batch.output_file_id == view.id else LineFile.ERRORS
        headers["X-Incomplete"] = "true" if view.state is FileState.GROWING else "false"
        headers["X-Last-Line"] = str(output_file.num_lines(batch, file))
    if view.state is FileState.GROWING:
        assert batch is not None
        pieces = _growing(here, output_file.pages(here.database, batch, file, offset))
    else:
        pieces = here.objects.read_async(key_of(view.id))
        if offset:
            pieces = _behind(pieces, offset)
        else:
            headers["Content-Length"] = str(view.bytes)
    return StreamingResponse(
        await begun(pieces), media_type="application/octet-stream", headers=headers
    )


async def _growing(here: Services, pages: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (page := await here.read(next, pages, None)) is not None:
        yield page


async def _behind(pieces: AsyncIterator[bytes], num_lines: int) -> AsyncIterator[bytes]:
    """What comes behind the first so many lines."""
    async for piece in pieces:
        at = 0
        while num_lines and (end := piece.find(b"\n", at)) >= 0:
            num_lines, at = num_lines - 1, end + 1
        if not num_lines:
            yield piece[at:]


@router.delete(
    "/{file_id}",
    responses=_ERRORS | documented(HTTPStatus.CONFLICT, door=Door.OPENAI),
    summary="Delete a file",
    response_description="It is gone.",
)
async def delete(here: Here, who: Who, file_id: FileId) -> DeletedFile:
    """The file is gone at once. A batch that reads it goes on."""
    await here.commit(files.delete, **_named(who, file_id))
    return DeletedFile(id=file_id)


async def _find(here: Services, who: Caller, name: str) -> FileView:
    return await here.query(files.find, **_named(who, name))


def _named(who: Caller, name: str) -> dict[str, Any]:
    """What a file is looked for by."""
    return {"file_id": id_in(name), "tenant": who.tenant, "name": printable(name)}


def object_of(view: FileView) -> FileObject:
    return FileObject(
        id=name_of(view.id),
        bytes=view.bytes,
        created_at=int(view.created_at.timestamp()),
        expires_at=int(view.expires_at.timestamp()) if view.expires_at else None,
        filename=view.filename,
        purpose=view.purpose,
        status="processed" if view.state is FileState.READY else "uploaded",
    )
