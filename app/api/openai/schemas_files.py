"""Files as OpenAI's clients know them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class FileObject(BaseModel):
    """A file."""

    id: str = Field(description="Its id.", examples=["file-0199e0a4f4a97c53a7b3a9f5d8f6d2ce"])
    object: Literal["file"] = Field("file", description="Always `file`.")
    bytes: int = Field(description="Its size; 0 while a batch adds to it.", examples=[120000])
    created_at: int = Field(description="When it was uploaded, in Unix time.")
    expires_at: int | None = Field(None, description="When it is deleted, in Unix time.")
    filename: str = Field(description="Its name.", examples=["requests.jsonl"])
    purpose: str = Field(description="What it is for.", examples=["batch"])
    status: Literal["uploaded", "processed"] = Field(
        description="`processed`, or `uploaded` while a batch adds to it."
    )
    status_details: str | None = Field(None, description="Always null.")


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[FileObject] = Field(description="The files.")
    first_id: str | None = Field(None, description="Id of the first.")
    last_id: str | None = Field(None, description="Id of the last: the next page's `after`.")
    has_more: bool = Field(description="Whether there are more behind it.")


class DeletedFile(BaseModel):
    """A file that was deleted."""

    id: str = Field(description="Its id.")
    object: Literal["file"] = Field("file", description="Always `file`.")
    deleted: Literal[True] = Field(True, description="Always true.")
