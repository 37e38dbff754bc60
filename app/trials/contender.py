"""What is tried: a configured model as it is, or with settings changed.

NAME                                  a model of models.toml
NAME:KEY=VALUE,KEY=VALUE              with other settings: dtype=float32, options.weights=int8,
                                      max_wait_ms=20, or of the worker: worker.threads=1
FILE.toml                             a settings file with one [models.NAME], laid over the rest
FILE.toml:KEY=VALUE                   both
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from app.config.file import Key, Loaded, overridden, read_file
from app.config.masking import shown
from app.config.prices import price_of_worker
from app.config.settings import ModelSettings, PriceSettings, Settings
from app.engines import registry
from app.engines.catalog import CatalogModel, load_catalog
from app.engines.device import dtype_name
from app.engines.spec import Files
from app.errors import ConfigError

_NEXT: Final = re.compile(r",(?=[A-Za-z_][\w.-]*=)")
"""Between two settings: a value may have commas of its own."""
_WORKER: Final = "worker"


@dataclass(frozen=True, slots=True)
class Contender:
    """A model, and all that its answers and their price depend on."""

    given: str  #: as it was named, without secrets
    model: str  #: its name among the settings
    settings: Settings

    @property
    def own(self) -> ModelSettings:
        return self.settings.models[self.model]

    @property
    def dtype(self) -> str:
        """What it computes in; "–" where its weights are not here."""
        if registry.find(self.own.engine).files(self.own) not in (Files.MODEL, Files.ANY_MODEL):
            return "–"
        return dtype_name(self.own.dtype, self.settings.worker.device)

    @property
    def price(self) -> PriceSettings | None:
        """What its device costs today; None if it has no price."""
        name = self.own.price or price_of_worker(self.settings, datetime.now(UTC).date())
        return self.settings.prices[name] if name else None

    def load(self) -> CatalogModel:
        """Its files and its tokenizer; raises `ConfigError` if it cannot be loaded."""
        catalog = load_catalog(self.settings, [self.model])[self.model]
        registry.check_folder(catalog.folder, self.own)
        return catalog

    def digest(self, folder: Path) -> str:
        """Hex SHA-256 of what decides on its answers and its speed, the name of its folder
        included: equal for runs that can be compared. A setting that a later version brings changes
        nothing for who leaves it out."""
        worker = self.settings.worker
        told = {
            "model": self.own.model_dump(
                mode="json", exclude={"default", "price", "source"}, exclude_defaults=True
            ),
            "folder": str(folder.name),
            "device": worker.device,
            "threads": worker.threads,
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def contender(given: str, loaded: Loaded) -> Contender:
    """Raises `ConfigError` for what names no model, or settings that are wrong."""
    name, colon, rest = given.partition(":")
    name, changes = name.strip(), []
    if name.endswith(".toml"):
        found = list(read_file(Path(name).expanduser()))
        name = _only_model(name, [key for key, _, _ in found])
        changes += found
    pairs = _NEXT.split(rest) if colon else []
    told = [(*_setting(name, pair, given), given) for pair in pairs]
    changes += told
    if name not in loaded.settings.models and ("models", name, "source") not in {
        key for key, _, _ in changes
    }:
        known = ", ".join(loaded.settings.models) or "none"
        raise ConfigError(f"There is no model {name}; there is {known}.")
    settings = overridden(loaded, changes) if changes else loaded.settings
    return Contender(_shown(given, told), name, settings)


def _only_model(file: str, keys: Iterable[Key]) -> str:
    names = sorted({key[1] for key in keys if key[0] == "models" and len(key) > 1})
    if len(names) != 1:
        there = f"it has {', '.join(names)}" if names else "it has none"
        raise ConfigError(f"{file}: name one model in it, as [models.NAME]; {there}.")
    return names[0]


def _setting(name: str, pair: str, given: str) -> tuple[Key, Any]:
    """`options.weights=int8` as a key and a value; what is not JSON is text."""
    key, equals, text = pair.partition("=")
    if not (equals and key.strip()):
        raise ConfigError(f"{given}: give settings behind the colon, as in {name}:dtype=float32.")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    parts = tuple(key.strip().split("."))
    return (parts if parts[0] == _WORKER else ("models", name, *parts)), value


def _shown(given: str, told: Iterable[tuple[Key, Any, str]]) -> str:
    """What was given, without what may be a secret."""
    for key, value, _ in told:
        if isinstance(value, str) and shown(key[-1], value) != value:
            given = given.replace(value, str(shown(key[-1], value)))
    return given
