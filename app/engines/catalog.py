"""The models that a process knows: where their files are, and what counts their tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from app.config.settings import ModelSettings, Settings
from app.engines import registry
from app.engines.checkpoint.card import NO_CARD, Card, load_card
from app.engines.checkpoint.models import ensure_files
from app.engines.text.tokenizer import Tokenizer, load_tokenizer
from app.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A configured model that is ready to be loaded."""

    settings: ModelSettings
    folder: Path
    tokenizer: Tokenizer
    card: Card = NO_CARD


def load_catalog(settings: Settings, names: Iterable[str] | None = None) -> dict[str, CatalogModel]:
    """The named models, or all; converts or fetches what is not there yet.

    Raises `ConfigError` if a model's engine or options are unknown, or its files missing or unfit.
    """
    catalog = {}
    for name in settings.models if names is None else names:
        model = settings.models[name]
        folder = ensure_files(name, model, Path(settings.cache_dir))
        try:
            registry.check(model)
            tokenizer, card = load_tokenizer(folder, model), load_card(folder, model)
        except ConfigError as error:
            raise ConfigError(f"Model {name}: {error}") from error
        catalog[name] = CatalogModel(model, folder, tokenizer, card)
    return catalog
