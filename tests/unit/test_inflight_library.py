"""The CPU kernels: compiled once, kept where they can be loaded, done without with a word."""

from __future__ import annotations

import ctypes
import logging
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.engines import builds
from app.engines.inflight import library
from app.engines.inflight.library import FLAGS, Built, compile_to

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
ARM: str | None = shutil.which("aarch64-linux-gnu-g++")

PROGRAM = """
    #include <cstdio>
    extern "C" float twice(float x) { return x + x; }
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small program in place of the kernels, and a folder to keep what is compiled of it in."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "program.cpp").write_text(PROGRAM)
    monkeypatch.setattr(library, "_FOLDER", folder)
    monkeypatch.setattr(builds, "_chosen", [])
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    library.built.cache_clear()
    builds.keep_in(tmp_path / "cache" / "kernels")
    yield folder
    library.built.cache_clear()


def _built_anew() -> Built:
    library.built.cache_clear()
    return library.built()


def _refuse_from(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Nothing can be loaded from below these, as from a tmpfs of a container."""
    load = ctypes.CDLL

    def load_or_refuse(name: str) -> ctypes.CDLL:
        if any(Path(name).is_relative_to(folder) for folder in folders):
            raise OSError(f"{name}: failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", load_or_refuse)


@needs_compiler
def test_the_library_is_kept_in_the_cache_folder_and_not_compiled_a_second_time(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = library.built()
    kept = list((tmp_path / "cache" / "kernels").iterdir())
    monkeypatch.setattr(library, "compile_to", lambda *_: pytest.fail("compiled again"))

    second = _built_anew()

    assert len(kept) == 1
    assert (first.trouble, second.trouble) == ("", "")
    assert second.state == f"compiled for {platform.machine()}"
    assert second.compiled is not None


@needs_compiler
def test_a_cache_folder_from_which_nothing_can_be_loaded_is_told_once_and_another_is_used(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    cache = tmp_path / "cache"
    _refuse_from(monkeypatch, cache)

    found, _, _ = [library.library() for _ in range(3)]

    assert found is not None
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert str(cache / "kernels") in record.getMessage()
    assert "failed to map segment" in record.getMessage()
    monkeypatch.setattr(library, "compile_to", lambda *_: pytest.fail("compiled again"))
    assert _built_anew().compiled is not None  # what is kept elsewhere is found


@needs_compiler
@pytest.mark.parametrize("what", ["a file is there", "it cannot be made"])
def test_a_cache_folder_that_cannot_be_written_does_not_keep_the_kernels_from_running(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    builds.keep_in(Path("/proc/kernels") if what == "it cannot be made" else sources / "file")
    (sources / "file").touch()
    (sources / "__pycache__").touch()  # nor beside the sources

    found = library.built()

    assert found.compiled is not None  # out of a temporary folder
    assert "compiled anew at each start" in found.trouble


@needs_compiler
def test_where_nothing_can_be_loaded_from_any_folder_torch_computes_and_that_is_told(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    _refuse_from(monkeypatch, Path("/"))

    assert [library.library() for _ in range(3)] == [None] * 3

    [record] = caplog.records
    assert "cannot be loaded from any folder" in record.getMessage()
    assert platform.machine() in record.getMessage()


def test_without_a_compiler_torch_computes_and_that_is_told(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("CXX", "no-such-compiler")

    assert library.library() is None

    assert library.built().state == "torch alone; there is no C++ compiler; install g++"
    assert "install g++" in caplog.records[0].getMessage()


@needs_compiler
def test_a_source_that_does_not_compile_here_is_told_with_the_compilers_first_line(sources: Path):
    (sources / "program.cpp").write_text("#error not for this machine")

    found = library.built()

    assert found.compiled is None
    assert "not for this machine" in found.trouble


@needs_compiler
def test_a_compiler_that_does_not_know_this_processor_compiles_for_all_of_its_kind(
    sources: Path, tmp_path: Path
):
    file = tmp_path / "kernels.so"

    compile_to(file, ["c++"], ["-mcpu=no-such-processor", "-mprefer-vector-width=nonsense"])

    twice = ctypes.CDLL(str(file)).twice
    twice.restype, twice.argtypes = ctypes.c_float, [ctypes.c_float]
    assert twice(21) == 42


def test_no_flag_of_x86_is_for_every_machine():
    assert not [flag for flag in FLAGS if flag.startswith("-m")]


@pytest.mark.skipif(ARM is None, reason="there is no compiler for ARM")
def test_the_kernels_compile_for_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert ARM is not None
    monkeypatch.setattr(library, "FLAGS", ["-O0", *FLAGS[1:]])  # in seconds
    compile_to(tmp_path / "kernels.so", [ARM], ["-march=armv8-a"])

    symbols = subprocess.run(
        ["aarch64-linux-gnu-nm", "--dynamic", str(tmp_path / "kernels.so")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "attend_float32" in symbols
    assert "attend_bfloat16" in symbols
    assert "multiply_bfloat16" not in symbols
