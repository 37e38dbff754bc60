"""What all objects of a request have in common: nothing unknown is in them."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

UNKNOWN_FIELD: Final = "unknown_field"


class Part(BaseModel):
    """An object of a request. Of its unknown fields the first is told.

    Pydantic's own check makes an error of each, which takes seconds and hundreds of megabytes for
    those that two megabytes hold. For the same reason every list in a part has `fail_fast`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _know_all(cls, given: Any) -> Any:
        if isinstance(given, dict):
            fields = cls.__pydantic_fields__
            known = {field.alias or name for name, field in fields.items()}
            for name in given:
                if name not in known:
                    raise PydanticCustomError(UNKNOWN_FIELD, "Unknown field", {"name": name})
        return given
