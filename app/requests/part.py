"""What all objects of a request have in common: null is nothing, and nothing unknown is in them."""

from __future__ import annotations

import functools
import json
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

UNKNOWN_FIELD: Final = "unknown_field"

MAX_TOLD: Final = 100
"""Characters of a field's name that are told."""

DROP_UNKNOWN: Final = {"drop_unknown": True}
"""As the context of a validation: what is not known is left out, at any depth."""


class Part(BaseModel):
    """An object of a request. A field that is null counts as left out: many clients write all that
    they know. Of its unknown fields the first is told.

    Pydantic's own check makes an error of each, which takes seconds and hundreds of megabytes for
    those that two megabytes hold. For the same reason every list in a part has `fail_fast`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _know_all(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict):
            return given
        known = _names(cls)
        if not given.keys() <= known and info.context is not DROP_UNKNOWN:
            unknown = next(name for name in given if name not in known)
            raise PydanticCustomError(UNKNOWN_FIELD, "Unknown field", {"name": printable(unknown)})
        return {name: it for name, it in given.items() if it is not None and name in known}


@functools.cache
def _names(part: type[Part]) -> frozenset[str]:
    """Of its fields, as requests have them."""
    return frozenset(field.alias or name for name, field in part.__pydantic_fields__.items())


def printable(name: object) -> str:
    """A field's name as somebody sent it, fit for one line of an error: JSON can spell half of a
    surrogate pair, with which no error could be told."""
    return json.dumps(str(name))[1:-1][:MAX_TOLD]
