"""What the bodies of all calls have in common, and what each tells of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from app.jobs import Kind
from app.requests.handling import Ignored, Refused
from app.requests.part import Part
from app.requests.prompts import Prompt
from app.requests.storable import parse_metadata


class Body(Part):
    """A body of one call. Those of the calls are in files of their own."""

    KIND: ClassVar[Kind]  #: of the models that answer it
    PROMPT_FIELD: ClassVar[str]  #: where its prompts are, for errors

    model: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None,
        description="Name of a configured model, with `:ADAPTER` behind it for one of its "
        "adapters; the default model of this kind when left out.",
        examples=["smollm2-135m-instruct"],
    )
    parse_special: bool = Field(
        False,
        description="Take what looks like the model's special tokens, as `<|im_end|>`, for these; "
        "otherwise it is text like any other. For prompts that are rendered elsewhere.",
        examples=[True],
    )
    metadata: Annotated[dict[str, str], BeforeValidator(parse_metadata)] = Field(
        default_factory=dict,
        description="The job's `metadata`: up to 16 texts of your own, given back with the job.",
        examples=[{"order": "17"}],
    )
    user: Annotated[str | None, Ignored("a job has no user"), Field(max_length=200)] = Field(
        None, examples=["user-42"]
    )
    safety_identifier: Annotated[str | None, Ignored("as `user`"), Field(max_length=200)] = Field(
        None, examples=["user-42"]
    )
    request_id: Annotated[str | None, Ignored("the job's id names it"), Field(max_length=200)] = (
        Field(None, examples=["request-42"])
    )
    priority: Annotated[Any, Refused("the job's own priority, beside the body, says it", (0,))] = (
        Field(None, examples=[5])
    )

    @property
    def meant(self) -> Body:
        """The body that says the same in the form that models are asked in: itself, unless it is
        of another API's call."""
        return self

    @property
    def shorter(self) -> Sequence[Body]:
        """Bodies that may be answered in its place if it is too long, each shorter than the one
        before."""
        return ()

    @property
    def prompts(self) -> list[Prompt]:
        """The distinct prompts, in order."""
        raise NotImplementedError

    @property
    def num_answers(self) -> int:
        """Answers per prompt."""
        return 1

    @property
    def most_tokens(self) -> int | None:
        """The output limit the caller asked for, if any."""
        return None

    @property
    def is_stored_chat(self) -> bool:
        """Whether it is told by the calls for stored chat completions, once completed."""
        return False

    @property
    def most_tokens_field(self) -> str:
        return "max_tokens"

    @property
    def grammar_field(self) -> str:
        """Where it is said what an answer has to match, for errors."""
        return "body"

    def check(self) -> None:
        """Raises `RequestError` for fields that do not go together."""
