"""The run file: others find what runs here, whatever state its files are in."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.config import run_file
from app.config.file import PROJECT, load
from app.errors import ConfigError

DEFAULT = PROJECT / "configs" / "default.toml"


def test_any_number_of_readers_at_once_find_what_runs_and_take_nothing_for_it(tmp_path: Path):
    seen: list[bool] = []

    def look(times: int = 300) -> None:
        seen.extend(bool(run_file.read(tmp_path)) for _ in range(times))

    def look_together() -> set[bool]:
        seen.clear()
        readers = [threading.Thread(target=look) for _ in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return set(seen)

    with run_file.only_one(tmp_path):
        run_file.write(tmp_path, {"api.port": 4321})
        while_it_runs = look_together()
    run_file.write(tmp_path, {"api.port": 4321})  # as a killed one leaves it
    while_none_runs = look_together()

    assert while_it_runs == {True}
    assert while_none_runs == {False}


def test_who_looks_keeps_no_up_from_starting(tmp_path: Path):
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            run_file.read(tmp_path)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for _ in range(300):
            with run_file.only_one(tmp_path):
                pass
    finally:
        stop.set()
        reader.join()


def test_looking_into_a_folder_where_nothing_ran_leaves_nothing_there(tmp_path: Path):
    assert run_file.read(tmp_path / "new") == {}
    assert run_file.read(tmp_path) == {}
    assert run_file.process(tmp_path) is None

    assert list(tmp_path.iterdir()) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
KEYS = st.sampled_from(["config", "api", "api.port", "database.url", "broker.url", "", ".", "x.y"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.binary()
    | JSON.map(json.dumps).map(str.encode)
    | st.dictionaries(KEYS, JSON)
    .map(lambda chosen: chosen | {"config": str(DEFAULT)})
    .map(json.dumps)
    .map(str.encode)
)
def test_a_damaged_run_file_is_one_clear_error_whatever_it_holds(tmp_path: Path, content: bytes):
    environ = {"GRISTMILL_CACHE_DIR": str(tmp_path)}
    with run_file.only_one(tmp_path):
        (tmp_path / "run.json").write_bytes(content)

        said = "the running system's"
        try:
            load(DEFAULT, environ)
        except ConfigError as error:
            said = error.message

    assert "run.json is damaged" in said or "the running" in said
    assert load(DEFAULT, environ).settings.api.port == 8000


@pytest.mark.parametrize("where", ["a file", "a file/below", "/proc/gristmill", "another's"])
def test_a_cache_folder_that_cannot_be_used_is_refused_by_its_name(tmp_path: Path, where: str):
    (tmp_path / "a file").touch()
    folder = tmp_path / where
    if where == "another's":
        (folder / "up.lock").mkdir(parents=True)

    with (
        pytest.raises(ConfigError, match=r"cache_dir cannot be used: .*GRISTMILL_CACHE_DIR") as it,
        run_file.only_one(folder),
    ):
        pass

    assert str(folder) in it.value.message
    assert "\n" not in it.value.message


def test_the_process_that_runs_here_is_known_and_a_false_id_is_not_believed(tmp_path: Path):
    with run_file.only_one(tmp_path):
        found = run_file.process(tmp_path)
        (tmp_path / "up.lock").write_text("1")  # as of another container

        with pytest.raises(ConfigError, match="no process that can be seen from here"):
            run_file.process(tmp_path)

    assert found == os.getpid()


def test_what_another_user_runs_is_told_from_what_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded = load(DEFAULT, {"GRISTMILL_CACHE_DIR": str(tmp_path)})
    monkeypatch.setattr(os, "geteuid", lambda: 54_321)

    with pytest.raises(ConfigError, match=r"database\.url is empty and what runs in .* is for its"):
        loaded.connected()
