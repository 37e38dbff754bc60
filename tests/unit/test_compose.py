"""compose.yaml: valid by the Compose specification, closed by default, and no secret inside."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from app.broker.queues import most_bytes
from app.config.file import load
from tests.compose import ROOT, document, services

SECRETS = {"POSTGRES_PASSWORD": "p0", "REDIS_PASSWORD": "r0", "FLOWER_BASIC_AUTH": "me:f0"}
OURS = ("migrate", "api", "worker", "worker-gpu", "rescue", "hooks", "flower")
NAMES = ("postgres", "redis", *OURS)


def test_it_is_valid_by_the_compose_specification():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema"),
            *("--builtin-schema", "vendor.compose-spec", str(ROOT / "compose.yaml")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
def test_what_a_worker_compiles_is_kept_on_a_volume_and_not_in_a_tmpfs_without_exec(name: str):
    dockerfile = (ROOT / "Dockerfile").read_text()
    [cache_dir] = re.findall(r"GRISTMILL_CACHE_DIR=(\S+)", dockerfile)
    worker = services(SECRETS)[name]

    assert f"models:{cache_dir}" in worker["volumes"]
    assert not [each for each in worker["tmpfs"] if cache_dir.startswith(each)]
    assert "GRISTMILL_CACHE_DIR" not in worker["environment"]


def test_it_has_every_part():
    assert set(document()["services"]) == set(NAMES)
    profiles = {name: each.get("profiles") for name, each in services(SECRETS).items()}
    assert profiles["worker"] == ["cpu"]
    assert profiles["worker-gpu"] == ["gpu"]


@pytest.mark.parametrize("missing", SECRETS)
def test_it_does_not_start_without_a_password(missing: str):
    with pytest.raises(KeyError, match=missing):
        services({name: text for name, text in SECRETS.items() if name != missing})


def test_every_secret_is_asked_for_in_the_example_and_given_in_none():
    example = (ROOT / ".env.example").read_text()
    given = dict(re.findall(r"^#?(\w+)=(.*)$", example, re.MULTILINE))
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", (ROOT / "compose.yaml").read_text()))

    assert used == set(given)
    assert {name for name, text in given.items() if text and name in SECRETS} == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_service_is_limited_and_comes_back_unless_it_runs_once(name: str):
    service = services(SECRETS)[name]
    runs_once = name == "migrate"

    limits = service["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory"}
    assert service["restart"] == ("no" if runs_once else "unless-stopped")
    assert ("healthcheck" in service) is not runs_once


@pytest.mark.parametrize("name", NAMES)
def test_a_service_is_closed_to_the_network_and_to_the_host(name: str):
    service = services(SECRETS)[name]

    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert not service.get("privileged")
    assert "network_mode" not in service
    if name in OURS:
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_services_wait_for_what_they_need():
    found = services(SECRETS)

    for name in ("api", "worker", "worker-gpu", "rescue"):
        assert found[name]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"},
            "redis": {"condition": "service_healthy"},
        }
    assert found["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


@pytest.mark.parametrize("name", OURS)
def test_the_environment_holds_valid_settings(name: str):
    environment = services(SECRETS)[name]["environment"]

    path = ROOT / environment.get("GRISTMILL_CONFIG", "configs/default.toml")
    settings = load(path, environment).connected()

    assert settings.database.url == "postgresql://gristmill:p0@postgres:5432/gristmill"
    assert settings.broker.url == "redis://:r0@redis:6379/0"


def test_redis_refuses_before_its_container_is_full_and_not_before_its_queues_are():
    redis = services(SECRETS)["redis"]
    [megabytes] = re.findall(r"--maxmemory (\d+)mb", redis["command"][-1])
    settings = load(ROOT / "configs/default.toml", {}).settings

    most = int(megabytes) << 20
    assert redis["deploy"]["resources"]["limits"]["memory"] == "2g"
    assert most <= 0.7 * (2 << 30)  # a rewrite of the append-only file takes some, too
    assert len(settings.models) * most_bytes(settings.broker) <= 0.7 * most  # some is producers'


def test_volumes_and_images_are_declared_and_pinned():
    found: dict[str, Any] = services(SECRETS)

    mounted = {
        mount.partition(":")[0] for each in found.values() for mount in each.get("volumes", ())
    }
    assert mounted == set(document()["volumes"])
    for name in ("postgres", "redis"):
        assert re.fullmatch(r"\w+:[\d.]+", found[name]["image"])


def test_the_image_does_not_run_as_root():
    users = re.findall(r"^USER (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)

    assert users == ["gristmill"]
