"""How a field of a request is treated: taken, unless it says here that it is ignored or refused.

Clients send far more fields than a queue has a use for. One that changes no answer is ignored; one
that would change it, and cannot be obeyed, is refused by name unless its value asks for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True, slots=True)
class Ignored:
    """Changes nothing. `why` is for people."""

    why: str

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(schema) | {"description": f"Ignored: {self.why}."}


@dataclass(frozen=True, slots=True)
class Refused:
    """Not obeyed. `why` is for people; values that are `neutral` ask for nothing and are taken."""

    why: str
    neutral: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(self, _: Any, __: Any) -> dict[str, Any]:
        return {"enum": [*self.neutral, None], "description": f"Not taken: {self.why}."}

    def _checked(self, value: Any) -> None:
        given = whole(value)
        if not any(type(given) is type(each) and given == each for each in self.neutral):
            raise PydanticCustomError("refused", "{why}", {"why": self.why})


def other_types(why: Mapping[str, str]) -> BeforeValidator:
    """Of an object's `type`: known ones that are not taken, and why."""

    def check(given: Any) -> Any:
        if isinstance(given, str) and given in why:
            raise PydanticCustomError("not_taken", "{why}", {"why": why[given]})
        return given

    return BeforeValidator(check)


def handling_of(field: FieldInfo) -> Ignored | Refused | None:
    """None: it is taken."""
    return next((it for it in field.metadata if isinstance(it, Ignored | Refused)), None)


def whole(value: Any) -> Any:
    """A whole number as an integer, however it is written: some languages write 16.0."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value


Whole = Annotated[int, BeforeValidator(whole)]


def all_whole(values: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """The same for each item of a list, once one is in the way."""
    try:
        return check(values)
    except ValidationError as error:
        given = error.errors(include_url=False)[0]["input"]
        if not (isinstance(values, list) and isinstance(given, float)):
            raise
    return check([whole(each) for each in values])
