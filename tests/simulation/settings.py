"""What the simulated processes are set to."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Final

from app.config.settings import ModelSettings, PriceSettings, Settings
from app.engines.catalog import CatalogModel
from app.engines.tokenizer import StubTokenizer
from tests.simulation.engine import MAX_ROWS, MODELS

SETTINGS: Final = Settings.model_validate(
    {
        "models": {
            name: ModelSettings(
                source="stub",
                kind="generate",
                engine="stub",
                max_batch_size=MAX_ROWS,
                max_batch_tokens=160,
                default_max_tokens=16,
                max_wait_ms=100,
                default=name == "static",
            )
            for name in MODELS
        },
        "prices": {"cpu": PriceSettings(per_device_hour=Decimal("0.036"), currency="EUR")},
        "worker": {"lease_s": 10, "heartbeat_s": 3, "step_timeout_s": 4, "load_timeout_s": 20},
        "rescue": {"sweep_ms": 1000, "lost_after_s": 5, "page_size": 3},
    }
)
CATALOG: Final = {
    name: CatalogModel(model, Path(), StubTokenizer(model))
    for name, model in SETTINGS.models.items()
}
SERVED: Final = (("static", "joins"), ("static",), ("static", "joins"))
"""Models of each worker: what one does not serve it has to pass on."""
