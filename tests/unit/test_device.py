"""Which device, how precise, with how many threads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.engines.device import (
    give_back_memory,
    given_cores,
    pick_device,
    pick_dtype,
    ran_out_of_memory,
    use_threads,
)
from app.errors import ConfigError


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 99), ("50000 100000", 1), ("150000 100000", 2)]
)
def test_a_containers_quota_limits_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(99)))

    assert given_cores(tmp_path / "cpu.max") == cores


def test_without_a_quota_the_affinity_decides(tmp_path: Path) -> None:
    assert given_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


def test_threads_are_set_as_told() -> None:
    before = torch.get_num_threads()

    use_threads(1)
    told = torch.get_num_threads()
    use_threads(before)

    assert (told, torch.get_num_threads()) == (1, before)


_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not _PAGES.exists() or "[never]" in _PAGES.read_text(), reason="there are no large pages"
)
def test_large_tensors_lie_in_large_pages() -> None:
    code = (
        "import app.engines, torch\n"
        "large = torch.ones(2**25)\n"
        "print(open('/proc/self/smaps_rollup').read())"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kilobytes = next(line for line in said.stdout.splitlines() if "AnonHugePages" in line)
    assert int(kilobytes.split()[1]) > 2**16


def test_a_dtype_is_taken_by_name_and_auto_by_what_the_device_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")

    def on_a_processor_with(**found: bool) -> torch.dtype:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        return pick_dtype("auto", cpu)

    assert pick_dtype("float16", cpu) is torch.float16
    assert on_a_processor_with(avx512_bf16=True) is torch.bfloat16
    assert on_a_processor_with(amx_bf16=True) is torch.bfloat16
    assert on_a_processor_with(avx2=True) is torch.float32


def test_a_device_beyond_those_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="torch sees 2 CUDA devices"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory", 2),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("HIP out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_however_an_allocator_says_it_a_lack_of_memory_is_one(error: Exception) -> None:
    assert ran_out_of_memory(error)


def test_nothing_else_counts_as_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as too_big:
        torch.empty(2**60)

    assert ran_out_of_memory(too_big.value)
    assert not ran_out_of_memory(RuntimeError("shapes do not match"))
    assert not ran_out_of_memory(OSError(errno.ENOENT, "No such file"))
    assert not ran_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def test_memory_is_given_back_on_any_device() -> None:
    give_back_memory(torch.device("cpu"))
