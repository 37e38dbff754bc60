"""How the models are named that are tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.config.file import Loaded, load
from app.errors import ConfigError
from app.trials.contender import contender

MODELS = """
[models.small]
source = "{folder}"
kind = "generate"
engine = "inflight"
default = true
max_batch_size = 8
options = {{ cache_tokens = 1000, weights = "full" }}

[models.other]
source = "{folder}"
kind = "embed"
engine = "encoder"
default = true
"""


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    (tmp_path / "models.toml").write_text(MODELS.format(folder=tmp_path))
    (tmp_path / "prices.toml").write_text(
        '[prices.cpu]\nper_device_hour = "0.08"\ncurrency = "USD"\n'
    )
    (tmp_path / "own.toml").write_text("[worker]\nthreads = 1\n")
    return load(tmp_path / "own.toml", {})


def test_a_name_is_the_model_as_it_is_configured(loaded: Loaded) -> None:
    assert contender("small", loaded).own == loaded.settings.models["small"]


def test_settings_behind_a_colon_take_the_place_of_its_own_and_of_the_workers(
    loaded: Loaded,
) -> None:
    found = contender(
        "small:dtype=float32,options.weights=int8,max_wait_ms=5,worker.threads=2", loaded
    )

    assert (found.own.dtype, found.own.max_wait_ms, found.own.max_batch_size) == ("float32", 5, 8)
    assert found.own.options == {"cache_tokens": 1000, "weights": "int8"}
    assert found.settings.worker.threads == 2
    assert loaded.settings.models["small"].dtype == "auto"
    assert contender("small", loaded).settings.worker.threads == 1


def test_a_value_may_have_commas_and_colons(loaded: Loaded) -> None:
    found = contender('small:options.upstreams=[{"url": "http://h:1/v1"}, 2],dtype=float16', loaded)

    assert found.own.options["upstreams"] == [{"url": "http://h:1/v1"}, 2]
    assert found.own.dtype == "float16"


def test_a_model_that_is_not_configured_may_be_told_whole(loaded: Loaded, tmp_path: Path) -> None:
    found = contender(f"new:source={tmp_path},kind=generate,engine=generate", loaded)

    assert found.own.engine == "generate"


def test_a_file_is_laid_over_the_settings_and_what_is_behind_it_over_the_file(
    loaded: Loaded, tmp_path: Path
) -> None:
    file = tmp_path / "b.toml"
    file.write_text(
        '[models.small]\ndtype = "float16"\nmax_batch_size = 2\n[worker]\nthreads = 3\n'
    )

    found = contender(f"{file}:max_batch_size=4", loaded)

    assert (found.model, found.own.dtype, found.own.max_batch_size) == ("small", "float16", 4)
    assert found.settings.worker.threads == 3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "There is no model ; there is small, other."),
        ("smal", "There is no model smal; there is small, other."),
        ("smal:dtype=float32", "There is no model smal"),
        ("small:", "give settings behind the colon, as in small:dtype=float32"),
        ("small:float32", "give settings behind the colon"),
        ("small:=3", "give settings behind the colon"),
        ("small:dtyp=float32", "models.small.dtyp is not a setting; did you mean dtype?"),
        ("small:dtype=float31", "models.small.dtype should be 'auto'"),
        ("small:max_batch_size=0", "models.small.max_batch_size should be greater"),
        ("small:max_batch_size=NaN", "models.small.max_batch_size"),
        ("small:options=3", "models.small.options"),
        ("small:worker.treads=3", "worker.treads is not a setting; did you mean threads?"),
        ("small:price=gold", "no price gold is in prices.toml"),
        ("new:source=./nowhere,kind=embed,engine=encoder", "there is no folder ./nowhere"),
        ("none.toml", "none.toml: cannot be read"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence_that_quotes_what_was_given(
    loaded: Loaded, given: str, told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        contender(given, loaded)

    assert told in str(error.value)
    assert ":" not in given or given.partition(":")[0] in str(error.value)


def test_of_a_file_the_line_is_told_and_it_names_one_model(loaded: Loaded, tmp_path: Path) -> None:
    wrong, none, two = (tmp_path / f"{name}.toml" for name in ("wrong", "none", "two"))
    wrong.write_text('[models.small]\n\ndtype = "x"\n')
    none.write_text("[worker]\nthreads = 1\n")
    two.write_text("[models.small]\ndefault = true\n[models.other]\ndefault = true\n")

    for file, told in (
        (wrong, "wrong.toml line 3: models.small.dtype"),
        (none, "name one model in it, as [models.NAME]; it has none"),
        (two, "it has other, small"),
    ):
        with pytest.raises(ConfigError, match=r".+") as error:
            contender(str(file), loaded)
        assert told in str(error.value)


def test_secrets_are_not_told(loaded: Loaded) -> None:
    found = contender("small:options.api_key=hush,dtype=float32", loaded)

    assert found.given == "small:options.api_key=***,dtype=float32"


def test_the_digest_follows_what_answers_and_speed_depend_on(
    loaded: Loaded, tmp_path: Path
) -> None:
    digests = [
        contender(given, loaded).digest(tmp_path)
        for given in ("small", "small:default=true,price=cpu", "small:dtype=float32")
    ]

    assert digests[0] == digests[1] != digests[2]
