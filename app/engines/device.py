"""The device under an engine: which one, in which precision, with how many threads."""

from __future__ import annotations

import ctypes
import errno
import gc
import math
import os
import platform
from pathlib import Path
from typing import Final

import torch

from app.engines.hardware import processor
from app.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises `ConfigError` if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"Unknown device {name}; give auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"The device is {name}, but torch sees {torch.cuda.device_count()} CUDA devices. "
            "Check nvidia-smi, CUDA_VISIBLE_DEVICES, and that this torch is a CUDA build."
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"Engines run on cpu and cuda, not on {device.type}.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        computes = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        computes = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.bfloat16 if computes else torch.float32


def dtype_name(name: str, device: str) -> str:
    """The same by the names that settings have."""
    return str(pick_dtype(name, pick_device(device))).removeprefix("torch.")


def memory_in_use(name: str) -> int | None:
    """Bytes of a CUDA device that are taken, by whomever; None of the host."""
    device = pick_device(name)
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def machine() -> str:
    """The device and its software, in words."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{processor()}, {given_cores()} cores"
    return f"{device}; torch {torch.__version__}; Python {platform.python_version()}"


def use_threads(threads: int) -> None:
    """Threads of CPU operators in this process; 0 takes the cores that the process may use."""
    torch.set_num_threads(threads or given_cores())


def given_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that the process is allowed: by affinity, and by the quota of a container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text().split()
    except OSError:
        return cores
    return cores if quota == "max" else min(cores, math.ceil(int(quota) / int(period)))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, or the host under a CPU engine, has no room."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(words in said for words in _NO_MEMORY)


_NO_MEMORY: Final = (
    "out of memory",  # CUDA, HIP, Triton and the allocators over them
    "allocate memory",  # torch on the host: can't, cannot, failed to
    "not enough memory",
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSPARSE, cuFFT
    "cudaerrormemoryallocation",
    "bad_alloc",
    "unable to allocate",
)
"""How allocators say that there is no room, where torch has no exception of its own for it."""


def give_back_memory(device: torch.device) -> None:
    """Let the device, or the host, have what torch keeps for later. Call it when no error holds on
    to the tensors that did not fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
