"""The CPU kernels: the C++ files of this folder, compiled once with the machine's own compiler.

x86-64 and ARM (aarch64) are tuned for; what any other compiles works, too. The compiled file is
kept where `builds` says. A folder that cannot be written, or from which nothing can be loaded (a
tmpfs of a container is noexec), gives way to the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from app.engines import builds

log = logging.getLogger(__name__)

_FOLDER: Final = Path(__file__).parent
FLAGS: Final = ("-O3", "-fno-math-errno", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_TUNING: Final = {
    "x86_64": ("-march=native", "-mprefer-vector-width=512"),
    "aarch64": ("-mcpu=native",),
}
COMPILE_S: Final = 600.0

LANES: Final = 16
"""Numbers of one vector; head sizes must be a multiple. kernels.h says the same."""


@dataclass(frozen=True, slots=True)
class Built:
    """The kernels, or why there are none."""

    compiled: ctypes.CDLL | None
    state: str  #: in a few words
    trouble: str = ""  #: what an operator may want to mend, in a sentence


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    return built().compiled


def products() -> ctypes.CDLL | None:
    """The kernels, if their own bfloat16 matrix product is the fastest here.

    It needs AVX-512 BF16; where the processor has matrix tiles (AMX), oneDNN uses those.
    """
    if torch.cpu.get_capabilities().get("amx_bf16"):
        return None
    compiled = library()
    return compiled if hasattr(compiled, "multiply_bfloat16") else None


def multiplies_int8() -> bool:
    """Whether these products take weights in int8: it needs AVX-512 VNNI besides."""
    return hasattr(products(), "has_int8")


@functools.cache
def built() -> Built:
    """Load the kernels, compiled now if they never were. Logs what is wrong with that, once."""
    found = _build()
    if found.trouble:
        log.warning("%s", found.trouble, extra={"action": "kernels"})
    return found


def _build() -> Built:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return _none("there is no C++ compiler; install g++")
    try:
        name = f"kernels-{_fingerprint(compiler)}.so"
        kept = [folder for folder in _folders() if (folder / name).exists()]
        for folder in kept:
            with contextlib.suppress(OSError):
                return _described(ctypes.CDLL(str(folder / name)))
        with tempfile.TemporaryDirectory() as temporary:
            fresh = Path(temporary) / name
            compile_to(fresh, [compiler], _TUNING.get(platform.machine(), ()))
            return _kept(fresh)
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", b"") or b""
        first = next(iter(said.decode(errors="replace").splitlines()), type(error).__name__)
        return _none(f"they could not be compiled ({first})")
    except OSError as error:
        return _none(f"they could not be compiled ({error})")


def compile_to(file: Path, compiler: Sequence[str], tuning: Sequence[str]) -> None:
    """Raises `subprocess.SubprocessError`. A compiler that does not know this processor compiles
    for all of its kind."""
    sources = map(str, sorted(_FOLDER.glob("*.cpp")))
    command = [*compiler, *FLAGS, *sources, "-o", str(file)]
    try:
        _run([*command, *tuning])
    except subprocess.CalledProcessError:
        if not tuning:
            raise
        _run(command)


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_S)


def _kept(fresh: Path) -> Built:
    """The fresh file, from the first folder where it can be kept and loaded."""
    troubles: list[str] = []
    for folder in _folders():
        try:
            file = folder / fresh.name
            folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            shutil.copy(fresh, part)
            part.replace(file)
            return _described(ctypes.CDLL(str(file)), troubles)
        except OSError as error:
            troubles.append(f"{folder}: {error.strerror or error}")
    try:
        return _described(ctypes.CDLL(str(fresh)), troubles)
    except OSError as error:
        troubles.append(str(error))
        return _none(f"they cannot be loaded from any folder ({'; '.join(troubles)})")


def _folders() -> Iterator[Path]:
    if folder := builds.chosen():
        yield folder
    yield _FOLDER / "__pycache__"


def _described(compiled: ctypes.CDLL, troubles: Sequence[str] = ()) -> Built:
    return Built(
        compiled,
        f"compiled for {platform.machine()}",
        f"The CPU kernels cannot be kept where they belong: {'; '.join(troubles)}. They may be "
        "compiled anew at each start: let cache_dir be a folder that programs may run from."
        if troubles
        else "",
    )


def _none(why: str) -> Built:
    return Built(
        None,
        f"torch alone; {why}",
        f"No CPU kernels on {platform.machine()}: {why}. The engine inflight runs in torch's "
        "operations, which is slower.",
    )


def _fingerprint(compiler: str) -> str:
    """What the compiled file depends on: source, flags, compiler, and this processor."""
    features = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("flags", "Features"))
    ][:1]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    sources = sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")])
    parts = [*(source.read_text() for source in sources), *FLAGS, compiler, version.stdout]
    parts += [platform.machine(), *_TUNING.get(platform.machine(), ()), *features]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
