"""What is wrong with a model's folder is said in one sentence, and never ends in a traceback."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.config.settings import ModelSettings, Settings
from app.engines import registry
from app.engines.catalog import load_catalog
from app.errors import ConfigError
from app.jobs import Kind
from tests.families.broken import BROKEN, Broken
from tests.unit.tiny_models import CONTEXT, load, save_bert, save_llama

ENGINES = ["generate", "inflight"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("whole") / "llama")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "llama"))


def look_at(folder: Path, engine: str) -> None:
    """All that is looked at before weights are read."""
    model = ModelSettings(
        source=str(folder), kind=Kind.GENERATE, engine=engine, context_tokens=CONTEXT
    )
    load_catalog(Settings(models={"m": model}))
    registry.check_folder(folder, model)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_folder_is_refused_with_a_sentence(
    folder: Path, broken: Broken, engine: str
) -> None:
    broken.spoil(folder)

    if not broken.early:
        look_at(folder, engine)
    with pytest.raises(ConfigError, match=broken.says) as refusal:
        (look_at if broken.early else load)(folder, engine)

    assert is_a_sentence(refusal.value)


def test_each_kind_of_broken_folder_is_there_once() -> None:
    names = [broken.name for broken in BROKEN]
    assert len(names) == len(set(names)) >= 10


@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_folder_is_found_to_be_so(whole: Path, engine: str) -> None:
    look_at(whole, engine)


def test_known_architectures_run_by_the_code_of_transformers_whatever_code_lies_beside(
    folder: Path,
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_llama.py").write_text("raise SystemExit('foreign code has run')")

    look_at(folder, "generate")
    load(folder, "generate")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_encoder_is_not_taken_for_a_decoder(tmp_path: Path, engine: str) -> None:
    bert = save_bert(tmp_path / "bert")

    with pytest.raises(ConfigError, match="use the engine encoder"):
        look_at(bert, engine)


@pytest.mark.parametrize("given", [1, "LlamaForCausalLM", [1], {"LlamaForCausalLM": 1}])
@pytest.mark.parametrize("engine", ["inflight", "generate"])
def test_classes_that_are_no_list_of_names_are_refused_in_a_sentence(
    whole: Path, tmp_path: Path, given: object, engine: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": given}))

    with pytest.raises(ConfigError, match=r"config\.json"):
        look_at(folder, engine)


FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10**12), st.floats(), st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=2), st.dictionaries(st.text(max_size=2), st.integers()),
)  # fmt: skip


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_wrong_with_a_file_ends_in_a_sentence(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    # given a folder of which one file is cut, has bytes changed, or says something else
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("bent") / "llama"))
    file = folder / data.draw(st.sampled_from(FILES))
    content = file.read_bytes()
    how = data.draw(st.sampled_from(["cut", "changed", "said"]))
    if how == "said" and file.name.endswith("config.json"):
        file.write_text(json.dumps(bend(json.loads(content), data)))
    elif how == "cut":
        file.write_bytes(content[: data.draw(st.integers(0, min(len(content), 2_000)))])
    else:
        place = data.draw(st.integers(0, min(len(content), 3_000) - 1))
        file.write_bytes(content[:place] + data.draw(st.binary(max_size=4)) + content[place + 1 :])

    refusal = None
    # when it is looked at and loaded, then there is an engine, or a sentence
    try:
        look_at(folder, "inflight")
        load(folder)
    except ConfigError as error:
        refusal = error
    shutil.rmtree(folder)
    assert refusal is None or is_a_sentence(refusal)


def is_a_sentence(refusal: ConfigError) -> bool:
    return re.fullmatch(r".{20,900}\.", refusal.message) is not None


def bend(config: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    name = data.draw(st.sampled_from(sorted(config)))
    return {**config, name: data.draw(VALUES)}
