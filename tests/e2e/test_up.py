"""`gristmill up`: one command starts everything, keeps it running, and takes it all away again."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.systems import Up, running_up
from tests.waiting import eventually

PAGES = ("api", "flower")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("a folder with spaces")
    with running_up(folder) as running:
        yield running


def test_another_terminal_submits_a_job_and_reads_its_answer(system: Up):
    done = system.gristmill("submit", "--as", "prompt", "ground", "--wait", "--json")

    job = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert job["state"] == "completed"
    assert job["response"]["choices"][0]["text"] == "ground"


def test_many_jobs_from_a_file_are_answered_each_with_its_line(system: Up, tmp_path: Path):
    lines = [{"prompt": "one"}, {"input": "two"}, {"prompt": "three", "max_tokens": 0}]
    file = tmp_path / "bodies.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))

    done = system.gristmill("submit", "--file", str(file), "--wait", "--json")

    told = {each["line"]: each for each in map(json.loads, done.stdout.splitlines())}
    assert told[1]["response"]["choices"][0]["text"] == "one"
    assert told[2]["kind"] == "embed"
    assert told[3]["error"]["param"] == "body.max_tokens"
    assert done.returncode == 1


def test_a_failed_job_ends_the_command_with_its_own_exit_code(system: Up):
    done = system.gristmill("submit", "--as", "prompt", "nan", "--wait")

    assert done.returncode == 5
    assert "failed" in done.stdout


def test_flower_and_the_api_documentation_answer(system: Up):
    chosen = system.run_file

    for port in (chosen["api.port"], chosen["flower.port"]):
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    assert system.gristmill("config", "get", "api.port").stdout.strip() == str(chosen["api.port"])


def test_what_was_chosen_is_for_this_user_alone(system: Up):
    assert (system.cache_dir / "run.json").stat().st_mode & 0o077 == 0


def test_a_second_up_in_the_same_cache_folder_is_refused(system: Up):
    done = system.gristmill("up")

    assert done.returncode == 3
    assert "already running here" in done.stderr
    assert system.process.poll() is None


def test_a_doctor_finds_the_running_system_well(system: Up):
    done = system.gristmill("doctor", "--json")

    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert findings["Postgres"]["ok"] is True, findings
    assert findings["Redis"]["ok"] is True
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["worker", "api", "rescue", "hooks", "flower"])
def test_a_part_that_is_killed_starts_again_and_work_goes_on(system: Up, name: str):
    killed = system.part(name)
    assert killed

    killed.send_signal(signal.SIGKILL)

    eventually(lambda: f"{name} ended with exit code -9 and starts again" in system.output)
    eventually(lambda: system.part(name) not in (None, killed), timeout_s=20)
    again = ("submit", "--as", "prompt", "again", "--wait")
    eventually(lambda: system.gristmill(*again).returncode == 0, timeout_s=60)


def test_ctrl_c_stops_everything_within_ten_seconds(tmp_path: Path):
    with running_up(tmp_path) as system:
        ports = [system.run_file["api.port"], system.run_file["flower.port"]]
        members = eventually(lambda: len(all_ := system.processes()) >= 6 and all_)

        started = time.monotonic()
        system.process.send_signal(signal.SIGINT)
        exit_code = system.process.wait(15)

        assert time.monotonic() - started < 10  # a promise, not a measure of speed
        assert exit_code == 0
        assert not [member for member in members if member.is_running()]
        assert not system.processes()
        for port in ports:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5)
        assert not (system.cache_dir / "run.json").exists()


def test_a_part_that_hangs_does_not_keep_the_rest_from_stopping(tmp_path: Path):
    with running_up(tmp_path) as system:
        for name in ("worker", "api"):
            part = system.part(name)
            assert part
            part.send_signal(signal.SIGSTOP)

        system.process.send_signal(signal.SIGINT)

        assert system.process.wait(12) == 0
        assert not system.processes()


def test_a_killed_up_leaves_nothing_behind_and_one_in_the_background_goes_on_until_down(
    tmp_path: Path,
):
    with running_up(tmp_path) as system:
        system.process.kill()
        eventually(lambda: not system.processes(), timeout_s=20)
    nothing = system.gristmill("down")

    started = system.gristmill("up", "--detach", timeout_s=180)
    try:
        twice = system.gristmill("up", "--detach")
        done = system.gristmill("submit", "--as", "prompt", "still here", "--wait")
        logged = system.gristmill("logs")
        with system.following("redis") as followed:
            eventually(lambda: "Ready to accept connections" in followed.read_text(), timeout_s=60)
            stopped = system.gristmill("down")
            eventually(lambda: "ready to exit" in followed.read_text())
    finally:
        again = system.gristmill("down")

    assert (nothing.returncode, "Nothing runs in" in nothing.stderr) == (0, True)
    assert started.returncode == 0, started.stderr
    assert "flower is ready.\n" in started.stderr
    assert "`gristmill down` stops everything." in started.stdout
    assert (twice.returncode, "already running here" in twice.stderr) == (3, True)
    assert done.returncode == 0, done.stderr
    starts = [line for line in logged.stdout.splitlines() if "Listening on http" in line]
    assert len(starts) == 2  # what the killed one logged is there
    assert all(line.startswith("api      | ") for line in starts)
    assert stopped.returncode == 0, stopped.stderr
    assert "Everything is stopped (process" in stopped.stderr
    assert not system.processes()
    assert "Nothing runs in" in again.stderr


def test_a_part_that_cannot_start_is_told_and_the_others_are_stopped(tmp_path: Path):
    system = Up(tmp_path, '[flower]\nhost = "0.0.0.0"\n', detach=True)  # refused without a password

    exit_code = system.process.wait(120)
    left = system.gristmill("down")

    assert exit_code == 4, system.output
    assert "Nothing runs in" in left.stderr
    assert "flower ended with exit code 3:" in system.output
    assert "set FLOWER_BASIC_AUTH" in system.output
    assert not system.processes()
    assert "set FLOWER_BASIC_AUTH" in system.gristmill("logs", "flower").stdout
    unknown = system.gristmill("logs", "flour")
    assert (unknown.returncode, "There is no log of flour in" in unknown.stderr) == (2, True)


def test_in_the_background_and_under_nohup_a_closed_terminal_changes_nothing_and_sigterm_ends_it(
    tmp_path: Path,
):
    background = ("sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh")  # as `nohup … &` does
    loopback = "::1" if socket.has_dualstack_ipv6() else "127.0.0.1"  # either serves
    up = Up(tmp_path, "".join(f'[{part}]\nhost = "{loopback}"\n' for part in PAGES), background)
    try:
        up.wait_until_ready()
        for name in PAGES:
            socket.create_connection((loopback, up.run_file[f"{name}.port"]), timeout=5).close()
        assert f"`kill {up.process.pid}` stops everything." in up.output

        up.process.send_signal(signal.SIGHUP)
        up.process.send_signal(signal.SIGINT)
        done = up.gristmill("submit", "--as", "prompt", "ground", "--wait")
        up.process.send_signal(signal.SIGTERM)

        assert done.returncode == 0, done.stderr
        assert up.process.wait(20) == 0
        assert "SIGTERM: everything is being stopped." in up.output
        assert "Everything is stopped." in up.output
    finally:
        up.process.kill()
