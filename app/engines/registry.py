"""Engines by name: ours and those of other packages, each imported only when it is chosen."""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

from app.config.settings import ModelSettings
from app.engines.base import Engine, Progress
from app.engines.spec import GROUP, EngineSpec
from app.errors import ConfigError, GristmillError
from app.printable import in_a_line


def names() -> list[str]:
    return sorted(_installed())


def find(name: str) -> EngineSpec:
    """Raises `ConfigError` for a name that no installed package brings, or whose package fails."""
    point = _installed().get(name)
    if point is None:
        known = ", ".join(names()) or "none, since Gristmill itself is not installed"
        raise ConfigError(f"Unknown engine {name}; known are {known}.")
    try:
        spec = point.load()
    except Exception as error:  # whatever a foreign package does
        raise ConfigError(
            f"The engine {name} cannot be found in {point.value}: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(spec, EngineSpec):
        raise ConfigError(f"The engine {name} is no EngineSpec in {point.value}.")
    return spec


@functools.cache
def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def check(settings: ModelSettings) -> None:
    """Raises `ConfigError` for an unknown engine, or what it does not take."""
    spec = find(settings.engine)
    if settings.kind not in spec.kinds:
        kinds = " or ".join(sorted(spec.kinds))
        raise ConfigError(
            f"The engine {settings.engine} runs models of kind {kinds}, not {settings.kind}."
        )
    if settings.adapters and not spec.takes_adapters:
        raise ConfigError(f"The engine {settings.engine} runs no LoRA adapters; vllm does.")
    if spec.check:
        attribute(spec.check)(settings)


def check_folder(folder: Path, settings: ModelSettings) -> None:
    """Raises `ConfigError` if the engine would refuse the model in the folder. Reads no weights."""
    if fits := find(settings.engine).fits:
        attribute(fits)(folder, settings)


def python_of(settings: ModelSettings) -> str:
    """The interpreter that is to run the engine."""
    if find(settings.engine).chooses_python:
        return str(settings.options.get("python") or sys.executable)
    return sys.executable


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
    return make(find(name).factory, folder, settings, device, threads, progress)


def make(
    factory: str,
    folder: Path,
    settings: ModelSettings,
    device: str,
    threads: int,
    progress: Progress,
) -> Engine:
    """The same for who knows the factory: another interpreter has not this one's packages."""
    try:
        return cast(Engine, attribute(factory)(folder, settings, device, threads, progress))
    except GristmillError:
        raise
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The engine {settings.engine} needs the module {error.name}, which {sys.executable} "
            "does not have."
        ) from error
    except Exception as error:  # nobody's prompt is in here yet: what it says may be told
        raise ConfigError(
            f"The engine {settings.engine} cannot load the model in {folder}: {in_a_line(error)}."
        ) from error


def attribute(target: str) -> Any:
    """What "module:attribute" names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
