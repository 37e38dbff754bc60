"""What all objects of a request have in common: null is nothing, and nothing unknown is in them."""

from __future__ import annotations

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
        fields = cls.__pydantic_fields__
        known = {field.alias or name for name, field in fields.items()}
        if info.context is not DROP_UNKNOWN:
            for name in given:
                if name not in known:
                    told = {"name": printable(name)}
                    raise PydanticCustomError(UNKNOWN_FIELD, "Unknown field", told)
        return {name: it for name, it in given.items() if it is not None and name in known}


def printable(name: object) -> str:
    """A field's name as somebody sent it, fit for one line of an error: JSON can spell half of a
    surrogate pair, with which no error could be told."""
    return json.dumps(str(name))[1:-1][:MAX_TOLD]
