"""What the simulated processes are set to."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Final

from app.config.settings import (
    BatchSettings,
    ModelSettings,
    Policy,
    PriceSettings,
    Settings,
)
from app.engines.catalog import CatalogModel
from app.engines.text.tokenizer import StubTokenizer
from tests.simulation.engine import MAX_ROWS, MODELS


def _model(name: str, max_rows: int, policy: Policy = Policy.FIXED) -> ModelSettings:
    return ModelSettings(
        source="stub",
        kind="generate",
        engine="stub",
        max_batch_size=max_rows,
        max_batch_tokens=40 * max_rows,
        default_max_tokens=16,
        max_wait_ms=100,
        batch=BatchSettings(policy=policy),
        default=name == "static",
    )


_SETTINGS: Final = Settings.model_validate(
    {
        "models": {name: _model(name, MAX_ROWS) for name in MODELS},
        "prices": {"cpu": PriceSettings(per_device_hour=Decimal("0.036"), currency="EUR")},
        "worker": {"lease_s": 10, "heartbeat_s": 3, "step_timeout_s": 4, "load_timeout_s": 20},
        "rescue": {"sweep_ms": 1000, "lost_after_s": 5, "page_size": 3},
    }
)
MAX_MESSAGES: Final = 12
"""In a queue: fewer than anybody may set, so that few jobs fill it."""

SETTINGS: Final = _SETTINGS.model_copy(
    update={"broker": _SETTINGS.broker.model_copy(update={"max_messages": MAX_MESSAGES})}
)
LEAST_ROWS: Final = 2
"""Of the model `static` in the worker that has less room than whoever submits believes."""
SERVED: Final = (
    {name: _model(name, MAX_ROWS) for name in MODELS},
    {"static": _model("static", LEAST_ROWS, Policy.ADAPTIVE)},
)
"""Models of each worker: what one does not serve it has to pass on."""


def catalog(models: dict[str, ModelSettings]) -> dict[str, CatalogModel]:
    return {
        name: CatalogModel(model, Path(), StubTokenizer(model)) for name, model in models.items()
    }
