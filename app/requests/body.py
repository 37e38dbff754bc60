"""What the bodies of all calls have in common, and what each tells of itself."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from app.jobs import Grammar, Kind, SamplingParams
from app.requests.part import Part
from app.requests.prompts import Prompt


class Body(Part):
    """A body of one call. Those of the calls are in files of their own."""

    KIND: ClassVar[Kind]  #: of the models that answer it
    PROMPT_FIELD: ClassVar[str]  #: where its prompts are, for errors

    model: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None,
        description="Name of a configured model; the default model of this kind when left out.",
        examples=["smollm2-135m-instruct"],
    )
    parse_special: bool = Field(
        False,
        description="Take what looks like the model's special tokens, as `<|im_end|>`, for these; "
        "otherwise it is text like any other. For prompts that are rendered elsewhere.",
        examples=[False],
    )
    user: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="Accepted for compatibility and not used.", examples=["user-42"]
    )

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
    def most_tokens_field(self) -> str:
        return "max_tokens"

    @property
    def grammar(self) -> Grammar | None:
        """What each answer has to match, if anything."""
        return None

    def sampling(self, max_tokens: int, answer: int) -> SamplingParams | None:
        """Sampling of answer number `answer` of a prompt, or None if none is drawn."""
        return None

    def check(self) -> None:
        """Raises `RequestError` for fields that do not go together."""
