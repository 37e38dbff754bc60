"""The CPU kernels: the C++ files of this folder, compiled once with the machine's own compiler.

The compiled file lies beside Python's own in __pycache__; where that cannot be written, each start
compiles anew.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import torch

log = logging.getLogger(__name__)

_FOLDER: Final = Path(__file__).parent
_FLAGS: Final = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-std=c++17"),
    *("-fopenmp", "-shared", "-fPIC"),
)

LANES: Final = 16
"""Numbers of one vector; head sizes must be a multiple. kernels.h says the same."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        log.warning("no C++ compiler: the engine runs in torch operations, which is slower")
        return None
    file = _FOLDER / "__pycache__" / f"kernels-{_fingerprint(compiler)}.so"
    try:
        with tempfile.TemporaryDirectory() as folder:
            if file.exists():
                return ctypes.CDLL(str(file))
            fresh = Path(folder) / file.name
            command = [
                compiler,
                *_FLAGS,
                *map(str, sorted(_FOLDER.glob("*.cpp"))),
                "-o",
                str(fresh),
            ]
            subprocess.run(command, check=True, capture_output=True)
            _keep(fresh, file)
            return ctypes.CDLL(str(fresh))
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("the kernels could not be compiled (%s): the engine is slower", error)
        return None


def products() -> ctypes.CDLL | None:
    """The kernels, if their own bfloat16 matrix product is the fastest here.

    It needs AVX-512 BF16; where the processor has matrix tiles (AMX), oneDNN uses those.
    """
    if torch.cpu.get_capabilities().get("amx_bf16"):
        return None
    compiled = library()
    return compiled if hasattr(compiled, "multiply_bfloat16") else None


def _keep(fresh: Path, file: Path) -> None:
    """Leave the compiled file for the next start, where only the installer may write."""
    try:
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        shutil.copy(fresh, part)
        part.replace(file)
    except OSError:
        log.info("the compiled kernels cannot be kept in %s", file.parent)


def _fingerprint(compiler: str) -> str:
    """What the compiled file depends on: source, flags, compiler, and this processor."""
    cpu: Any = Path("/proc/cpuinfo")
    features = [line for line in cpu.read_text().splitlines() if line.startswith("flags")][:1]
    sources = sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")])
    parts = [*(source.read_text() for source in sources), *_FLAGS, compiler, *features]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
