"""`gristmill verify` on real engine processes and tiny models of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from app import cli
from tests.unit.tiny_encoders import save_classifier
from tests.unit.tiny_models import save_bert, save_gpt2, save_llama

Run = Callable[..., tuple[int, str, str]]

MODELS = """
[models.llama]
source = "{folder}/llama"
kind = "generate"
engine = "inflight"
dtype = "float32"
default = true
max_batch_size = 5
options = {{ cache_tokens = 4000 }}

[models.gpt2]
source = "{folder}/gpt2"
kind = "generate"
engine = "generate"
dtype = "float32"
max_batch_size = 3

[models.bert]
source = "{folder}/bert"
kind = "embed"
engine = "encoder"
dtype = "float32"
default = true

[models.classifier]
source = "{folder}/classifier"
kind = "classify"
engine = "encoder"
dtype = "float32"
default = true

[models.crossing]
source = "{folder}/crossing"
kind = "rerank"
engine = "encoder"
dtype = "float32"
default = true

[models.echo]
source = "stub"
kind = "translate"
engine = "stub"
default = true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    save_llama(folder / "llama")
    save_gpt2(folder / "gpt2")
    save_bert(folder / "bert")
    save_classifier(folder / "classifier")
    save_classifier(folder / "crossing", labels=1)
    (folder / "models.toml").write_text(MODELS.format(folder=folder))
    (folder / "prices.toml").write_text(
        '[prices.cpu]\nper_device_hour = "0.08"\ncurrency = "USD"\n'
    )
    (folder / "own.toml").write_text(
        f'cache_dir = "{folder / "cache"}"\n[worker]\nthreads = 1\ndevice = "cpu"\n'
    )
    return folder


@pytest.fixture
def gristmill(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> Run:
    """Run a command in this process; (exit code, standard output, standard error)."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["--config", str(folder / "own.toml"), *arguments])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.mark.timeout(400)
def test_in_float32_every_kind_of_model_answers_as_transformers_does(gristmill: Run) -> None:
    # when all models are verified that can be
    code, out, err = gristmill("verify", "--limit", "6", "--tokens", "12", "--json")

    # then
    found = {each["model"]: each for each in map(json.loads, out.splitlines())}
    assert (code, found.keys()) == (0, {"llama", "gpt2", "bert", "classifier", "crossing"}), err
    assert "Left out: echo: the engine stub has no weights" in err
    for name in ("llama", "gpt2"):
        for way in ("alone", "company"):
            figures = found[name][way]
            assert figures["identical"] == figures["prefix"] == figures["same_token"] == 1
            assert figures["logprob_max"] < 2e-3
            assert figures["perplexity"] < 2e-3
    assert found["bert"]["company"]["cosine_min"] > 0.999999
    assert found["classifier"]["company"]["same_class"] == 1
    assert found["crossing"]["company"]["same_order"] == 1
    assert found["crossing"]["alone"]["score_max"] < 1e-4


@pytest.mark.timeout(200)
def test_a_coarser_precision_breaks_its_bounds_and_the_exit_code_says_so(
    gristmill: Run, folder: Path
) -> None:
    # given requests of which only prompts and lengths count
    file = folder / "prompts.jsonl"
    lines = [
        {"prompt": "the old mill", "temperature": 1.9, "seed": 3, "max_tokens": 24, "n": 3},
        {"body": {"messages": [{"role": "user", "content": "mills"}], "model": "gpt"}},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))

    # when
    code, out, _ = gristmill(
        *("verify", "llama:dtype=bfloat16", "--prompts", str(file), "--tokens", "8", "--json"),
        *("--fail-over", "logprob_mean=1e-6", "--fail-under", "prefix=0"),
    )

    # then
    verdict = json.loads(out)
    assert code == 1
    assert (verdict["dtype"], verdict["num_prompts"]) == ("bfloat16", 2)
    assert verdict["bounds"]["prefix"]["kept"]
    assert not verdict["bounds"]["logprob_mean"]["kept"]
    assert verdict["company"]["logprob_mean"] > 1e-6


def test_wrong_use_is_told_before_anything_is_loaded(gristmill: Run, folder: Path) -> None:
    files = {
        "empty": b"\n \n",
        "latin": "à la carte\n".encode("latin-1"),
        "broken": b'{"prompt": "a"}\n{"prompt": \n',
        "list": b'{"prompt": "a"}\n[1]\n',
        "odd": b'{"body": 3}\n',
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)

    for arguments, told in (
        (["lama"], "There is no model lama; there is llama, gpt2"),
        (["llama:dtyp=float32"], "did you mean dtype?"),
        (["echo"], "the engine stub has no weights here"),
        (["llama", "bert", "--reference", "x"], "--reference is for one model"),
        (["llama", "--reference", "./none"], "there is no folder ./none"),
        (["llama", "bert", "--prompts", str(folder / "models.toml")], "for models of one kind"),
        (["llama", "--prompts", "nowhere"], "No such file"),
        (["llama", "--prompts", str(folder / "empty")], "The file has no prompts."),
        (["llama", "--prompts", str(folder / "latin")], "line 1: The line is not UTF-8, at byte 1"),
        (["llama", "--prompts", str(folder / "broken")], "line 2: The line is not JSON"),
        (["llama", "--prompts", str(folder / "list")], "line 2: The line is not a JSON object"),
        (["llama", "--prompts", str(folder / "odd")], "line 1: body must be a JSON object"),
        (["llama", "--tokens", "0"], "--tokens"),
        (["llama", "--fail-under", "1.1"], "from 0 to 1"),
        (["llama", "--fail-under", "nan"], "from 0 to 1"),
        (["llama", "--fail-under", "sane=0.5"], "give one of identical"),
        (["llama", "--fail-over", "0.5"], "give one of logprob_mean"),
        (["llama", "--fail-over", "logprob_max=-1"], "from 0 on"),
        (["bert", "--fail-under", "identical=0.5"], "identical is not measured of such a model"),
    ):
        code, out, err = gristmill("verify", *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert told in " ".join(err.split()), arguments


def test_a_prompt_that_the_model_does_not_take_is_told_by_its_line(
    gristmill: Run, folder: Path
) -> None:
    file = folder / "long.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{{"prompt": "{"m" * 5000}"}}\n')

    code, _, err = gristmill("verify", "llama", "--prompts", str(file))

    assert code == 2
    assert "line 2 (prompt): The prompt has" in " ".join(err.split())
