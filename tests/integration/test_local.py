"""The embedded servers: real processes that start fast, end with us, and keep what they stored."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from app.errors import ConfigError, Unavailable
from app.local.child import Child
from app.local.servers import EmbeddedPostgres, EmbeddedRedis
from app.local.upkeep import Answer
from tests.waiting import eventually


@pytest.fixture
def long_folder(tmp_path: Path) -> Path:
    """Longer than a Unix socket's path may be, with a space and quotes in it."""
    return tmp_path / 'with "space" \\ and' / ("deep" * 30)


def test_postgres_starts_in_a_long_folder_with_a_space_and_keeps_its_rows(long_folder: Path):
    with EmbeddedPostgres(long_folder) as server, psycopg.connect(server.url) as connection:
        connection.execute("CREATE TABLE kept (answer int)")
        connection.execute("INSERT INTO kept VALUES (42)")

    with EmbeddedPostgres(long_folder) as server, psycopg.connect(server.url) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


def test_postgres_refuses_a_connection_without_the_password(tmp_path: Path):
    with EmbeddedPostgres(tmp_path) as server:
        stranger = server.url.replace((tmp_path / "password").read_text(), "guess")

        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(stranger)

    assert (tmp_path / "password").stat().st_mode & 0o077 == 0


def test_postgres_does_not_log_a_failed_statement_or_the_row_it_quotes(tmp_path: Path):
    with EmbeddedPostgres(tmp_path) as server, psycopg.connect(server.url) as connection:
        connection.execute("CREATE TABLE prompts (text text CHECK (length(text) < 3))")

        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute("INSERT INTO prompts VALUES ('a secret prompt')")

    log = (tmp_path / "server.log").read_text()
    assert "violates check constraint" in log
    assert "secret" not in log


def test_redis_starts_in_a_long_folder_with_a_space_and_keeps_its_keys(long_folder: Path):
    with EmbeddedRedis(long_folder) as server, redis.Redis.from_url(server.url) as client:
        client.lpush("queue", "message")

    with EmbeddedRedis(long_folder) as server, redis.Redis.from_url(server.url) as client:
        assert client.lrange("queue", 0, -1) == [b"message"]
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("maxmemory") == {"maxmemory": str(1280 << 20)}


def test_redis_refuses_a_connection_without_the_password(tmp_path: Path):
    with EmbeddedRedis(tmp_path) as server:
        port = int(server.url.rpartition(":")[2].removesuffix("/0"))
        stranger = redis.Redis(port=port, retry=None)

        with pytest.raises(redis.AuthenticationError):
            stranger.ping()


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedRedis])
def test_a_server_leaves_no_process_behind(kind: type, tmp_path: Path):
    with kind(tmp_path):
        assert _processes_of(tmp_path)

    assert not _processes_of(tmp_path)


@pytest.mark.parametrize("kind", ["EmbeddedPostgres", "EmbeddedRedis"])
def test_a_server_ends_when_its_parent_is_killed(kind: str, tmp_path: Path):
    program = (
        "import sys, time; from pathlib import Path; from app.local import servers\n"
        f"with servers.{kind}(Path(sys.argv[1])): print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"

        parent.send_signal(signal.SIGKILL)

    eventually(lambda: not _processes_of(tmp_path))
    with getattr(sys.modules["app.local.servers"], kind)(
        tmp_path
    ) as server:  # and the folder still works
        assert server.url


def test_a_data_folder_of_another_postgres_version_is_refused(tmp_path: Path):
    with EmbeddedPostgres(tmp_path):
        pass
    (tmp_path / "data" / "PG_VERSION").write_text("17\n")

    with pytest.raises(ConfigError, match=r"made by PostgreSQL 17 and this is .*18\."):
        EmbeddedPostgres(tmp_path).start()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path):
    (tmp_path / "appendonly.aof").write_bytes(b"this is no append-only file")

    with pytest.raises(Unavailable, match=r"(?s)Redis ended with exit code 1.*server\.log"):
        EmbeddedRedis(tmp_path).start()


def test_a_second_server_on_one_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.local.servers.STOP_TIMEOUT_S", 0.2)
    with EmbeddedRedis(tmp_path), pytest.raises(ConfigError, match="Another server is running"):
        EmbeddedRedis(tmp_path).start()


def test_a_child_that_ignores_its_stop_signal_is_killed_with_its_children(tmp_path: Path):
    stubborn = "trap '' TERM; (trap '' TERM; sleep 60) & echo ready; wait; sleep 60"
    child = Child("stubborn", ["bash", "-c", stubborn], tmp_path / "log")
    child.start()
    eventually(lambda: "ready" in child.tail())
    members = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]

    child.stop(timeout_s=0.2)

    eventually(lambda: not any(member.is_running() for member in members))
    assert child.exit_code == -signal.SIGKILL


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedRedis])
def test_a_servers_folder_that_was_open_is_closed_to_other_users_with_all_that_is_made_in_it(
    kind: type, tmp_path: Path
):
    folder, log = tmp_path / "server", tmp_path / "logs" / "server.log"
    for made in (folder, log.parent):
        made.mkdir(mode=0o755)
    log.touch(mode=0o644)

    with kind(folder, log=log):
        found = [folder, log.parent, *folder.rglob("*"), *log.parent.rglob("*")]

        assert len(found) > 3
        assert not [path for path in found if path.exists() and path.stat().st_mode & 0o077]


def test_what_a_child_makes_is_for_this_user_alone(tmp_path: Path):
    child = Child("maker", ["sh", "-c", "echo prompt > made"], tmp_path / "log", prefix=())
    with contextlib.chdir(tmp_path):
        child.start()

    eventually(lambda: child.exit_code == 0)

    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_folder_of_another_user_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)

    with pytest.raises(ConfigError, match="cannot be closed to other users") as caught:
        EmbeddedRedis(tmp_path).start()

    assert "GRISTMILL_CACHE_DIR" in caught.value.message


@pytest.mark.parametrize("content", [None, "", "half\n", "\0" * 22])
def test_a_lost_or_empty_password_file_is_written_anew_and_the_data_stay(
    tmp_path: Path, content: str | None
):
    with EmbeddedPostgres(tmp_path, durable=False) as server:
        with psycopg.connect(server.url) as connection:
            connection.execute("CREATE TABLE kept (answer int)")
        server.stop()
        (tmp_path / "password").unlink()
        if content is not None:
            (tmp_path / "password").write_text(content)

        server.start()

        with psycopg.connect(server.url) as connection:
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedRedis])
def test_a_server_whose_folder_was_removed_starts_again_empty_under_the_same_url(
    kind: type, tmp_path: Path
):
    with kind(tmp_path / "folder") as server:
        url = server.url
        server.stop()
        shutil.rmtree(tmp_path / "folder")

        server.start()

        assert server.url == url
        connect = psycopg.connect if kind is EmbeddedPostgres else redis.Redis.from_url
        with connect(url) as connection:
            assert connection.execute_command("PING") if kind is EmbeddedRedis else connection


def test_redis_with_an_empty_password_file_is_open_to_nobody(tmp_path: Path):
    (tmp_path / "password").touch()

    with EmbeddedRedis(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        stranger = redis.Redis(port=int(server.url.rpartition(":")[2].removesuffix("/0")))
        with pytest.raises(redis.AuthenticationError):
            stranger.ping()


def test_a_data_folder_without_a_version_is_refused_by_its_name(tmp_path: Path):
    (tmp_path / "data").mkdir()

    with pytest.raises(ConfigError, match=r"data holds no data of Postgres that can be read"):
        EmbeddedPostgres(tmp_path).start()


def test_a_new_data_folder_is_synced_before_it_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran: list[list[str]] = []
    server = EmbeddedPostgres(tmp_path)

    def run(command: list[str], stdin: str) -> None:
        ran.append(command)
        (tmp_path / "data.new").mkdir(exist_ok=True)

    monkeypatch.setattr(server, "_run", run)

    server.prepare()

    assert not {"--no-sync", "-N", "-F"} & {word for command in ran for word in command}


def test_a_server_whose_port_was_taken_while_it_was_down_says_so(tmp_path: Path):
    with EmbeddedRedis(tmp_path) as server:
        port = int(server.url.rpartition(":")[2].removesuffix("/0"))
        server.stop()

        with (
            socket.create_server(("127.0.0.1", port)),
            pytest.raises(Unavailable, match=f"Redis cannot have port {port} of 127.0.0.1"),
        ):
            server.launch()

        assert server.start().url.endswith(f":{port}/0")  # once it is free again


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedRedis])
def test_a_server_that_is_frozen_is_silent_and_is_killed_with_all_its_processes(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("app.local.servers.ANSWER_S", 0.5)
    with kind(tmp_path) as server:
        members = _processes_of(tmp_path)
        well = server.answer()
        for member in members:
            member.suspend()

        frozen = server.answer()
        server.kill()

        eventually(lambda: server.exit_code is not None)
        eventually(lambda: not _processes_of(tmp_path))
        server.start()
        assert (well, frozen, server.answer()) == (Answer.READY, Answer.SILENT, Answer.READY)


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Every other process that works in the folder or has a file of it open."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            links = Path(f"/proc/{process.pid}/fd").iterdir()
            paths = [process.cwd(), *(str(link.readlink()) for link in links)]
            if process.pid != os.getpid() and any(str(folder) in path for path in paths):
                found.append(process)
    return found
