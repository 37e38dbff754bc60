"""The device under an engine: which one, in which precision, with how many threads; and loading."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

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


def load_model(
    auto_class: Any,
    folder: Path,
    dtype: str,
    device: torch.device,
    shrink: Callable[[PreTrainedModel], None] | None = None,
    unused: str | None = None,
) -> PreTrainedModel:
    """A model from a folder that `app.engines.models.ensure_files` made ready, for inference.

    `auto_class` is one of transformers' Auto classes; `shrink` changes the model before it takes
    room on the device. Raises `ConfigError` if transformers does not
    know the model or the folder lacks some of its weights, which would be random otherwise; those
    whose names begin with `unused` may be.
    """
    if device.type == "cuda":
        # Streams and pinned memory are made on the current device, wherever their tensors are.
        torch.cuda.set_device(device.index or 0)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model, report = auto_class.from_pretrained(
            folder,
            dtype=pick_dtype(dtype, device),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"The model in {folder} cannot be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if unused is not None:
        missing = [name for name in missing if not name.startswith(unused)]
    if missing:
        raise ConfigError(f"The model in {folder} lacks weights: {', '.join(missing[:5])}.")
    # Weights keep requires_grad: torch folds a strided batch into one matrix product only for
    # those, and otherwise repeats the output layer for each row of a prefill, 200 times slower.
    if shrink is not None:
        shrink(model)
    loaded: PreTrainedModel = model.eval().to(device)
    return loaded


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, or the host under a CPU engine, has no room."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
