"""What another user of this machine learns of a `gristmill up`: no prompt, no key, no password."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.stranger import CAN_BE_ONE, look
from tests.systems import Up
from tests.waiting import eventually

pytestmark = pytest.mark.skipif(not CAN_BE_ONE, reason="only root can become another user")

PROMPT: Final = "a prompt that nobody else knows"
CONTROL: Final = "a text that everybody may know"


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """Where other users may look: pytest's own folders are closed to them."""
    folder = Path(tempfile.mkdtemp(prefix="everybodys-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def system(open_folder: Path) -> Iterator[Up]:
    """It was run before by a version that left its folders open."""
    for old in ("the cache", "the cache/redis", "the cache/logs"):
        (open_folder / old).mkdir(mode=0o755)
    up = Up(open_folder)
    try:
        up.wait_until_ready()
        up.config.chmod(0o600)  # whoever writes a key into a file closes it
        with up.config.open("a") as settings:
            settings.write(f'[api]\nkey = "{_made_key(up)}"\n')
        yield up
    finally:
        up.end()


def _made_key(up: Up) -> str:
    """The first key, once the API has heard of it."""
    made = up.gristmill("keys", "create", "--name", "first")
    assert made.returncode == 0, made.stderr
    url = f"http://127.0.0.1:{up.run_file['api.port']}/v1/jobs"
    eventually(lambda: httpx.get(url, trust_env=False).status_code == 401)
    return made.stdout.strip()


@contextlib.contextmanager
def client_at_work(system: Up, folder: Path) -> Iterator[None]:
    """`gristmill submit` that waits for a job which runs all the while, and one that is done."""
    bodies = [{"prompt": PROMPT}, {"prompt": f"{PROMPT}\nsleep 60000"}]
    file = folder / "bodies.jsonl"
    file.write_text("\n".join(map(json.dumps, bodies)))
    file.chmod(0o600)
    command = [sys.executable, "-m", "app.cli", "--config", str(system.config), "submit"]
    with file.open() as bodies_in, running([*command, "--file", "-", "--wait"], bodies_in):
        yield


@contextlib.contextmanager
def running(command: list[str], stdin: IO[str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=stdin, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.timeout(500)
def test_another_user_finds_no_prompt_no_key_and_no_password_anywhere(
    system: Up, open_folder: Path
) -> None:
    chosen = system.run_file
    key = tomllib.loads(system.config.read_text())["api"]["key"]
    passwords = [str(urlsplit(chosen[f"{name}.url"]).password) for name in ("database", "broker")]
    (open_folder / "everybodys").write_text(CONTROL)
    speaking = [sys.executable, "-c", "import time; time.sleep(600)", CONTROL]

    with client_at_work(system, open_folder), running(speaking) as everybodys:
        jobs = eventually(lambda: _running(chosen["api.port"], key), timeout_s=120)
        began = psutil.Process(system.process.pid).create_time() - 1
        found = look([PROMPT, key, CONTROL, *passwords], began, _doors(chosen, jobs))

    learnt = {each.partition(" in ")[0] for each in found}
    assert learnt == {CONTROL}, found
    places = {each.partition(" in ")[2] for each in found}
    assert f"file {open_folder / 'everybodys'}" in places
    assert f"/proc/{everybodys.pid}/cmdline" in places


def _running(port: int, key: str) -> list[str]:
    """Ids of the jobs, once one is done and the other runs."""
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.get(f"http://127.0.0.1:{port}/v1/jobs", headers=headers, trust_env=False)
    jobs: list[dict[str, Any]] = answer.raise_for_status().json()["data"]
    states = sorted(job["state"] for job in jobs)
    return [job["id"] for job in jobs] if states == ["completed", "running"] else []


def _doors(chosen: dict[str, Any], jobs: list[str]) -> dict[int, list[str]]:
    """What is asked of each port without a password, and with one that is guessed."""

    def get(path: str, more: str = "") -> str:
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{more}\r\n"

    api = ["/v1/jobs", "/metrics", "/openapi.json", "/docs", "/v1/models", "/readyz"]
    api += [f"/v1/jobs/{job}" for job in jobs]
    flower = [
        "/",
        "/tasks",
        "/api/tasks",
        "/api/workers",
        "/metrics",
        "/broker",
        "/api/queues/length",
    ]
    flower += [f"/task/{job}" for job in jobs] + [f"/api/task/info/{job}" for job in jobs]
    database, broker = (
        int(urlsplit(chosen[f"{it}.url"]).port or 0) for it in ("database", "broker")
    )
    startup = "\0\3\0\0user\0gristmill\0database\0gristmill\0\0"
    guess = "Authorization: Bearer guess-guess-guess\r\n"
    return {
        chosen["api.port"]: [get(path, more) for path in api for more in ("", guess)],
        chosen["flower.port"]: [get(path) for path in flower],
        broker: ["KEYS *\r\nLRANGE celery 0 -1\r\nQUIT\r\n", "AUTH x\r\nCONFIG GET *\r\nQUIT\r\n"],
        database: [f"\0\0\0{chr(len(startup) + 4)}{startup}"],
    }
