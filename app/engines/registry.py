"""Engines by name, each imported only when it is chosen."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Final, cast

from app.config.settings import ModelSettings
from app.engines.base import Engine, Progress
from app.errors import ConfigError

ENGINES: Final = {
    "stub": "app.engines.stub:StubEngine",
    "generate": "app.engines.generate:GenerateEngine",
    "encoder": "app.engines.encoder:EncoderEngine",
    "inflight": "app.engines.inflight:InflightEngine",
}


def create(
    name: str,
    folder: Path,
    settings: ModelSettings,
    *,
    device: str,
    threads: int,
    progress: Progress,
) -> Engine:
    """Load the model in `folder` into the engine `name`; takes as long as the loading does.

    Raises `ConfigError` for an unknown name, or a model or device that the engine cannot use.
    """
    if name not in ENGINES:
        raise ConfigError(f"Unknown engine {name}; known are {', '.join(ENGINES)}.")
    module, _, factory = ENGINES[name].partition(":")
    try:
        found = import_module(module)
    except ImportError as error:
        raise ConfigError(f"The engine {name} needs the module {error.name}.") from error
    engine = getattr(found, factory)(folder, settings, device, threads, progress)
    return cast(Engine, engine)
