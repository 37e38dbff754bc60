"""`[models.NAME.options]` of the engine `openai`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.config.settings import ModelSettings
from app.errors import ConfigError

NO_FILES: Final = "upstream"
"""The `source` of a model of which no file is here: prompts go out as text."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Upstream(_Part):
    """One server."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")]  #: up to and with /v1
    weight: Annotated[float, Field(gt=0, strict=False)] = 1.0  #: its share of the requests
    key_env: str = ""  #: environment variable that holds the key
    key_file: str = ""  #: file that holds it

    def key(self) -> str:
        """Empty if it has none. Raises `ConfigError` where it should be and is not."""
        if self.key_env:
            found = os.environ.get(self.key_env, "")
            where = f"environment variable {self.key_env}"
        elif self.key_file:
            where = self.key_file
            try:
                found = Path(self.key_file).expanduser().read_text()
            except OSError as error:
                raise ConfigError(f"The key in {where} cannot be read: {error.strerror}.") from None
        else:
            return ""
        key = found.strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ConfigError(f"There is no key in {where}.")
        return key


class Options(_Part):
    model: Annotated[str, Field(min_length=1)]  #: by the upstream's name
    url: str = ""  #: of the one upstream, or else
    upstreams: tuple[Upstream, ...] = ()
    key_env: str = ""
    key_file: str = ""
    server: Literal["vllm", "sglang", "llamacpp", "openai"] = "openai"
    """Whose names of sampling parameters it knows beyond OpenAI's own."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    timeout_s: Annotated[float, Field(gt=0, strict=False)] = 300.0  #: without a byte of an answer
    charges: bool = False  #: a cost in the answer's usage is part of the job's

    @model_validator(mode="after")
    def _has_one_kind_of_url(self) -> Options:
        if bool(self.url) == bool(self.upstreams):
            raise ValueError("give url or upstreams")
        return self

    @classmethod
    def of(cls, settings: ModelSettings) -> Options:
        """Raises `ConfigError` that names the option; values are not quoted: one may be a key."""
        try:
            made = cls.model_validate(_tuples(settings.options))
            made.servers()
            return made
        except ValidationError as error:
            problem = error.errors(include_input=False, include_url=False)[0]
            name = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                raise ConfigError(f"The engine openai has no option {name}.") from None
            reason = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(f"Options of the engine openai: {name}: {reason}.") from None

    def servers(self) -> tuple[Upstream, ...]:
        if self.upstreams:
            return self.upstreams
        return (Upstream(url=self.url, key_env=self.key_env, key_file=self.key_file),)


def _tuples(options: dict[str, object]) -> dict[str, object]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def check(settings: ModelSettings) -> None:
    """Raises `ConfigError` for what cannot be right."""
    Options.of(settings)
    if settings.source == NO_FILES and settings.context_tokens is None:
        raise ConfigError('context_tokens has to be set where the source is "upstream".')
