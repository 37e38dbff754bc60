"""Settings are read from files and environment; each mistake is named with its file and line."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from app.config import run_file
from app.config.file import PROJECT, load, rows
from app.config.prices import price_of_worker
from app.errors import ConfigError

MODELS = """\
[models.chat]
source = "some/model"
kind = "generate"
engine = "generate"
default = true
"""
PRICES = '[prices.cpu]\nper_device_hour = "0.08"\ncurrency = "USD"\n'


@pytest.fixture
def write(tmp_path: Path):
    """`write("settings", models=…, prices=…)`: three files side by side; the path of the first."""

    def write(text: str = "", *, models: str = MODELS, prices: str = PRICES) -> Path:
        (tmp_path / "models.toml").write_text(models)
        (tmp_path / "prices.toml").write_text(prices)
        (tmp_path / "my.toml").write_text(f'cache_dir = "{tmp_path}/cache"\n{text}')
        return tmp_path / "my.toml"

    return write


@pytest.mark.parametrize("name", ["default.toml", "gpu.toml"])
def test_the_configurations_that_are_shipped_are_valid(name: str):
    loaded = load(PROJECT / "configs" / name, {})

    assert {model.engine for model in loaded.settings.models.values()}
    assert loaded.settings.worker.price in loaded.settings.prices


def test_default_toml_shows_every_setting_at_its_default(write):
    shipped = load(PROJECT / "configs" / "default.toml", {})
    bare = load(write(), {})

    sections = {"database", "broker", "worker", "energy", "rescue", "retention", "api", "flower"}
    assert shipped.settings.model_dump(include=sections) == bare.settings.model_dump(
        include=sections
    )
    unset = {row[0] for row in rows(shipped) if row[2] == "default"}
    assert not {name for name in unset if name.partition(".")[0] in sections}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[worker]\nlease_ms = 30", "my.toml line 3: worker.lease_ms is not a setting; did you "
         "mean lease_s, in seconds?"),
        ("[api]\nprot = 80", "my.toml line 3: api.prot is not a setting; did you mean port?"),
        ("[worker]\n\nmax_wait_ms = 5", "my.toml line 4: worker.max_wait_ms is not a setting; it "
         "belongs under [models.NAME]."),
        ("[wroker]\nlease_s = 30", "my.toml line 3: wroker is not a setting; did you mean worker?"),
        ('[api]\nport = "8000"', "my.toml line 3: api.port should be a valid integer."),
        ("[api]\nport = 70000", "my.toml line 3: api.port should be less than or equal to 65535 "
         "(it is 70000)."),
        ("[worker]\nlease_s = nan", "my.toml line 3: worker.lease_s should be a finite number"),
        ("[worker]\nheartbeat_s = 20", "my.toml line 3: worker.heartbeat_s must be at most half of "
         "worker.lease_s (30 s)"),
        ("[energy]\nidle_watts = 30\nbusy_watts = 20", "my.toml line 3: energy.idle_watts is "
         "more than energy.busy_watts (20)"),
        ("[energy]\nidle_watts = 30", "my.toml line 3: energy.idle_watts is more"),
        ('[energy]\nsource = "model"', "my.toml line 3: energy.source is model: energy."),
        ("[energy]\nbusy_watts = -1", "my.toml line 3: energy.busy_watts should be greater"),
        ("[energy]\nbusy_watts = inf", "my.toml line 3: energy.busy_watts should be a finite"),
        ("[energy]\nbusy_watts = 1e9", "my.toml line 3: energy.busy_watts should be less"),
        ("[energy]\ncarbon_grams_per_kwh = nan", "my.toml line 3: energy.carbon_grams_per_kwh "),
        ("[energy]\nreading_ms = 1", "my.toml line 3: energy.reading_ms should be greater than or"),
        ('[energy]\nsource = "rapi"', "my.toml line 3: energy.source should be 'auto', 'nvml',"),
        ('[worker]\nmodels = ["chat", "gone"]', "my.toml line 3: worker.models no model gone is "
         "configured (chat)."),
        ('[worker]\nprice = "gold"', "my.toml line 3: worker.price no price gold in prices.toml"),
        ('[worker]\ndevice = "gpu"', "my.toml line 3: worker.device should match"),
        ('[database]\nurl = "mysql://host/name"', "my.toml line 3: database.url must begin with "
         "postgresql://."),
        ('[broker]\nurl = "amqp://host"', "my.toml line 3: broker.url must begin with redis://,"),
        ("[broker]\npriority_steps = [3, 6]", "my.toml line 3: broker.priority_steps must begin "
         "with 0 and rise"),
        ("[worker", "my.toml: is not TOML: "),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_with_its_file_and_line(write, text: str, complaint: str):
    path = write(text)

    with pytest.raises(ConfigError) as caught:
        load(path, {})

    assert complaint in caught.value.message


@pytest.mark.parametrize(
    ("models", "complaint"),
    [
        ("", "models.toml: no model is configured."),
        (MODELS.replace('engine = "generate"\n', ""), "models.toml line 2: models.chat.engine is "
         "required."),
        (MODELS.replace("generate", "sing", 1), "models.toml line 3: models.chat.kind should be "
         "'generate', 'embed', 'classify', 'translate' or 'rerank'"),
        (MODELS.replace("= true", "= false"), "models.toml line 3: models.chat.kind no model has "
         "`default = true` for kind generate (chat)."),
        (MODELS + MODELS.replace("chat", "talk"), "models.toml line 10: models.talk.default "
         "several models have `default = true` for kind generate (chat, talk)."),
        (MODELS + "default_max_tokens = 9000", "models.toml line 6: "
         "models.chat.default_max_tokens is more than max_output_tokens (4096)."),
        (MODELS.replace("some/model", "/no/such/folder"), "models.toml line 2: models.chat.source "
         "there is no folder /no/such/folder."),
        (MODELS.replace("some/model", "package:no-such"), "models.toml line 2: models.chat.source "
         "the package no-such is not installed"),
        (MODELS + 'batch.polcy = "adaptive"', "models.toml line 6: models.chat.batch.polcy is not "
         "a setting; did you mean policy?"),
        (MODELS + 'batch.policy = "clever"', "models.toml line 6: models.chat.batch.policy should "
         "be 'fixed' or 'adaptive'"),
        (MODELS + "batch.wait_cost = 0", "models.toml line 6: models.chat.batch.wait_cost should "
         "be greater than 0"),
    ],
)  # fmt: skip
def test_a_wrong_model_is_refused_with_its_file_and_line(write, models: str, complaint: str):
    path = write(models=models)

    with pytest.raises(ConfigError) as caught:
        load(path, {})

    assert complaint in caught.value.message


def test_a_wrong_price_is_refused_with_its_file_and_line(write):
    path = write(prices='[prices.cpu]\nper_device_hour = "-1"\ncurrency = "dollars"\n')

    with pytest.raises(ConfigError) as caught:
        load(path, {})

    first, second = caught.value.message.splitlines()
    assert "prices.toml line 2: prices.cpu.per_device_hour should be greater" in first
    assert "prices.toml line 3: prices.cpu.currency should match" in second


ONE = '[prices.one]\nper_device_hour = "1"\ncurrency = "USD"\ndevice = "gpu"\n'
TWO = ONE.replace("prices.one", "prices.two")


@pytest.mark.parametrize(
    ("prices", "complaint"),
    [
        (ONE + TWO, "prices.toml line 8: prices.two.device overlaps with one"),
        (
            f"{ONE}valid_from = 2026-01-01\n{TWO}valid_from = 2026-01-01",
            "prices.toml line 10: prices.two.valid_from overlaps with one (",
        ),
        (
            f"{ONE}valid_until = 2026-03-01\n{TWO}valid_from = 2026-02-28",
            "prices.toml line 10: prices.two.valid_from overlaps with one (",
        ),
        (
            f"{ONE}valid_from = 2026-03-01\nvalid_until = 2026-03-01",
            "prices.toml line 6: prices.one.valid_until must be later than valid_from.",
        ),
        (ONE.replace('"gpu"', '"one"'), "prices.toml line 4: prices.one.device is the id of a"),
        (f'{ONE}batch_discount = "1.5"', "prices.toml line 5: prices.one.batch_discount should"),
        (f'{ONE}per_million_cached_input_tokens = "NaN"', "prices.toml line 5: prices.one.per_mil"),
        (f'{ONE}valid_from = "soon"', "prices.toml line 5: prices.one.valid_from should be a"),
    ],
)
def test_prices_that_contradict_each_other_are_refused_with_file_and_line(
    write, prices: str, complaint: str
):
    path = write(prices=f"{prices}\n{PRICES}")

    with pytest.raises(ConfigError) as caught:
        load(path, {})

    assert complaint in caught.value.message


def test_a_worker_takes_the_price_of_its_device_that_is_valid_when_it_starts(write):
    prices = f"{ONE}valid_until = 2026-03-01\n{TWO}valid_from = 2026-03-01\n"
    settings = load(write('[worker]\nprice = "gpu"', prices=prices), {}).settings

    assert price_of_worker(settings, date(2026, 2, 28)) == "one"
    assert price_of_worker(settings, date(2026, 3, 1)) == "two"
    later = load(write('[worker]\nprice = "one"', prices=prices), {}).settings
    with pytest.raises(ConfigError, match=r"prices\.toml line 2: no price one"):
        price_of_worker(later, date(2026, 3, 1))


@pytest.mark.parametrize(("text", "prices"), [('[worker]\nprice = ""', PRICES), ("", "")])
def test_a_device_may_have_no_price(write, text: str, prices: str):
    settings = load(write(text, prices=prices), {}).settings

    assert price_of_worker(settings, date(2026, 3, 1)) is None


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read \(No such file"):
        load(tmp_path / "gone.toml", {})


def test_the_settings_file_overrides_models_toml_key_by_key(write):
    path = write("[models.chat]\nmax_batch_size = 64")

    loaded = load(path, {})

    assert loaded.settings.models["chat"].max_batch_size == 64
    assert loaded.settings.models["chat"].source == "some/model"
    assert loaded.source(("models", "chat", "max_batch_size")).endswith("my.toml line 3")


def test_a_price_keeps_every_digit(write):
    path = write(prices=PRICES.replace("0.08", "0.123456789"))

    assert load(path, {}).settings.prices["cpu"].per_device_hour == Decimal("0.123456789")


def test_the_environment_wins_and_is_read_by_type(write):
    environ = {
        "GRISTMILL_API__PORT": "9000",
        "GRISTMILL_API__HOST": "0",
        "GRISTMILL_WORKER__LEASE_S": "40.5",
        "GRISTMILL_WORKER__MODELS": "chat",
        "GRISTMILL_LOG_LEVEL": "DEBUG",
        "GRISTMILL_LOG_FORMAT": "json",
        "HOME": "/elsewhere",
    }

    loaded = load(write("[api]\nport = 1"), environ)

    settings = loaded.settings
    assert (settings.api.port, settings.api.host) == (9000, "0")
    assert settings.worker.lease_s == 40.5
    assert settings.worker.models == ("chat",)
    assert settings.log_level == "DEBUG"
    assert loaded.source(("api", "port")) == "environment variable GRISTMILL_API__PORT"


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("GRISTMILL_DATABSE__URL", "x", "GRISTMILL_DATABSE__URL is not a setting; did you mean "
         "GRISTMILL_DATABASE__URL?"),
        ("GRISTMILL_API__PORT", "many", "variable GRISTMILL_API__PORT: api.port should be a valid "
         "integer."),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_refused_by_name(write, variable: str, value: str, complaint: str):
    path = write()

    with pytest.raises(ConfigError) as caught:
        load(path, {variable: value})

    assert complaint in caught.value.message


def test_the_settings_file_can_be_named_by_the_environment(write):
    path = write("[api]\nport = 1234")

    assert load(environ={"GRISTMILL_CONFIG": str(path)}).settings.api.port == 1234


def test_passwords_are_masked_where_settings_are_shown(write):
    environ = {"GRISTMILL_DATABASE__URL": "postgresql://me:secret@host/name"}

    shown = {name: value for name, value, _ in rows(load(write(), environ))}

    assert shown["database.url"] == "postgresql://me:***@host/name"


def test_a_running_system_is_found_while_it_runs(write, tmp_path: Path):
    path, cache_dir = write("[api]\nport = 1234"), tmp_path / "cache"
    chosen = {
        "config": str(path),
        "api.port": 4321,
        "broker.url": "redis://h:1/0",
        "database.url": "postgresql://h:2/d",
    }

    with run_file.only_one(cache_dir):
        run_file.write(cache_dir, chosen)
        # another process would see the lock taken; here flock sees another open file, too
        during = load(path, {})
    after = load(path, {})

    assert during.connected().api.port == 4321
    assert during.source(("api", "port")) == "the running `gristmill up`"
    assert after.settings.api.port == 1234
    with pytest.raises(ConfigError, match=r"database\.url is empty and nothing runs in"):
        after.connected()


def test_what_a_killed_system_left_behind_is_not_taken_for_a_running_one(write, tmp_path: Path):
    path, cache_dir = write(), tmp_path / "cache"
    with run_file.only_one(cache_dir):
        pass
    run_file.write(cache_dir, {"config": str(path), "api.port": 4321})

    assert load(path, {}).settings.api.port == 8000


def test_a_second_system_in_one_cache_folder_is_refused(tmp_path: Path):
    with (
        run_file.only_one(tmp_path),
        pytest.raises(ConfigError, match=r"already running here \(process \d+\)"),
        run_file.only_one(tmp_path),
    ):
        pass


SERVICE_LINKS = {
    "GRISTMILL_PORT": "tcp://10.0.0.1:8000",
    "GRISTMILL_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "GRISTMILL_PORT_8000_TCP_PROTO": "tcp",
    "GRISTMILL_PORT_8000_TCP_PORT": "8000",
    "GRISTMILL_PORT_8000_TCP_ADDR": "10.0.0.1",
    "GRISTMILL_SERVICE_HOST": "10.0.0.1",
    "GRISTMILL_SERVICE_PORT": "8000",
    "GRISTMILL_API_SERVICE_HOST": "10.0.0.1",
    "GRISTMILL_API_SERVICE_PORT": "8000",
    "GRISTMILL_API_SERVICE_PORT_HTTP": "8000",
    "GRISTMILL_API_PORT": "tcp://10.0.0.1:8000",
    "GRISTMILL_API_PORT_8000_UDP_ADDR": "10.0.0.1",
}


def test_what_kubernetes_sets_for_a_service_of_our_name_is_left_out(write):
    path = write("")

    loaded = load(path, SERVICE_LINKS)

    assert loaded.settings.api.port == 8000
    assert not any("GRISTMILL" in source for source in loaded.sources.values())


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("GRISTMILL_API_PORT", "8001"),
        ("GRISTMILL_PORT", "8001"),
        ("GRISTMILL_API__SERVICE_HOST", "10.0.0.1"),
        ("GRISTMILL_BROKER_URL", "redis://broker"),
    ],
)
def test_a_typing_error_is_not_taken_for_a_service(write, variable, text):
    with pytest.raises(ConfigError, match=f"{variable} is not a setting"):
        load(write(""), {variable: text})
