"""No password is shown, whatever is in it and wherever it stands in a URL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.broker.app import make_app
from app.config.broker_url import problem_in
from app.config.file import load, rows
from app.config.masking import masked, shown
from app.config.settings import Settings
from app.errors import ConfigError
from app.store.address import Address

URLS: Final = (
    *("postgresql://me:{}@host/name", "postgresql://me:{}@one:5432,two:5433/name?sslmode=require"),
    *("postgresql://host/name?user=me&password={}", "postgresql://me:{}@%2Frun%2Fpg/name"),
    *("postgresql://me:{}@host/name?sslpassword={}", "postgres+psycopg://me:{}@host"),
    *("redis://:{}@host:6379/0", "rediss://me:{}@host/1?ssl_cert_reqs=none", "redis://{}@host/0"),
    *("unix://:{}@/run/redis.sock?db=1", "redis+socket://me:{}@/run/redis.sock"),
    *("redis://host/0?password={}", "https://me:{}@hub.example/model", "{}", "host={} password={}"),
    "sentinel://:{}@one:26379;sentinel://:{}@two:26379;sentinel://three:26379/0",
)
SURE: Final = "Zq"
"""Begins and ends every password, so that it cannot be found by chance."""

PASSWORDS: Final = st.text(
    st.sampled_from("/@:?#%&=;,+ []\\'\"{}$é\n\t0aZ") | st.characters(exclude_categories=["Cs"]),
    max_size=12,
).map(lambda text: f"{SURE}{text}{SURE}")


def spellings(url: str, password: str) -> list[str]:
    """As it should be written, and as it often is."""
    return [
        url.format(*[each] * 2) for each in (quote(password, safe=""), quote(password), password)
    ]


def leaks(password: str, *texts: object) -> bool:
    """Whether a text holds any of the password's beginning, however it is spelled."""
    return any(SURE in str(text) for text in texts)


@given(st.sampled_from(URLS), PASSWORDS)
def test_a_url_is_shown_without_anything_of_its_password(url: str, password: str) -> None:
    for spelled in spellings(url, password):
        assert not leaks(password, masked(spelled), shown("url", spelled))
        if "://" in spelled:
            assert not leaks(password, shown("source", spelled))


@given(st.sampled_from(["sentinel_password", "token", "password"]), PASSWORDS)
def test_what_is_called_a_password_or_a_token_is_not_shown(name: str, password: str) -> None:
    assert shown(name, password) == "***"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://me:pa/ss@host/name", "postgresql://***"),
        ("postgresql://me:pa%2Fss@host:5432/name", "postgresql://me:***@host:5432/name"),
        ("postgresql://host/name?password=pass", "postgresql://host/name?password=***"),
        ("postgresql://me@one,two/name?sslmode=require", None),
        ("postgresql://", "postgresql://***"),
        ("redis://127.0.0.1:6379/0", None),
        ("redis://secret@host/0", "redis://***@host/0"),
        ("redis://sec:ret@host/0", "redis://***:***@host/0"),
        ("unix://:secret@/run/redis.sock?db=1", "unix://:***@/run/redis.sock?db=1"),
        (
            "sentinel://:secret@one:26379;sentinel://two:26379/0",
            "sentinel://:***@one:26379;sentinel://two:26379/0",
        ),
        ("redis://:se;cret@[::1]:6379/0", "redis://:***@[::1]:6379/0"),
        ("host=db password=secret", "***"),
    ],
)
def test_the_rest_of_a_url_is_shown_as_long_as_it_is_certain(
    url: str, expected: str | None
) -> None:
    assert masked(url) == (expected or url)


@given(st.sampled_from(URLS), PASSWORDS)
def test_no_error_about_a_url_quotes_its_password(url: str, password: str) -> None:
    for spelled in spellings(url, password):
        said: list[object] = [problem_in(spelled, ""), problem_in(spelled, "master")]
        try:
            Address.of(spelled)
        except ConfigError as error:
            said.append(error)

        assert not leaks(password, *said)


@given(st.sampled_from(URLS), st.sampled_from(["database.url", "broker.url"]), PASSWORDS)
def test_settings_are_listed_refused_and_represented_without_a_password(
    tmp_path_factory: pytest.TempPathFactory, url: str, name: str, password: str
) -> None:
    variables = {f"GRISTMILL_{name.upper().replace('.', '__')}": url.format(*[password] * 2)}
    secrets = {"GRISTMILL_BROKER__SENTINEL_PASSWORD": password, "GRISTMILL_API__TOKEN": password}

    for environment in (variables, variables | secrets):
        try:
            loaded = load(environ=environment)
            said = [*rows(loaded), repr(loaded.settings), str(loaded)]
        except ConfigError as error:
            said = [error]

        assert not leaks(password, *said)


@pytest.mark.parametrize(
    "line", ["[api]\ntoken = 1234567", "[broker]\nsentinel_password = 1234567"]
)
def test_a_password_that_was_written_as_a_number_is_not_quoted(tmp_path: Path, line: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(line)

    with pytest.raises(ConfigError) as caught:
        load(file, {})

    assert "1234567" not in str(caught.value)


BROKERS: Final = (
    *(("redis://me:{}@127.0.0.1:1/0", ""), ("unix://:{}@/run/redis.sock?db=1", "")),
    ("sentinel://:{}@127.0.0.1:1;sentinel://:{}@127.0.0.1:2/0", "master"),
)


@pytest.mark.parametrize(("url", "master"), BROKERS)
def test_a_worker_tells_nobody_its_brokers_passwords(url: str, master: str) -> None:
    from app.worker.pool import control

    password = f"{SURE}/@{SURE}"
    broker = {
        "url": url.format(*[quote(password, safe="")] * 2),
        "sentinel_master": master,
        "sentinel_password": password if master else "",
    }

    class State:
        app: Any
        consumer: Any

    with make_app(Settings.model_validate({"broker": broker})) as app:
        state = State()
        state.app, state.consumer = app, State()
        state.consumer.controller = Controller(app)
        with app.connection_for_write() as connection:
            said = [connection, repr(connection), connection.as_uri(), app.bugreport()]
        told = control.stats(state)
        told_settings = app.conf.table(with_defaults=True)

    assert not leaks(password, json.dumps(told), told_settings, *said)
    assert told["broker"]["uri"]


class Controller:
    """What Celery's own `stats` takes from a connection."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def stats(self) -> dict[str, Any]:
        with self._app.connection_for_read() as connection:
            return {"pid": 1, "broker": connection.info()}


def test_secrets_inside_lists_and_tables_are_not_shown_either() -> None:
    given = [{"url": "http://u:hush@host/v1", "api_key": "hush"}, "http://u:hush@host/v1"]

    assert "hush" not in str(shown("upstreams", given))
    assert shown("upstreams", [{"weight": 2}]) == [{"weight": 2}]
