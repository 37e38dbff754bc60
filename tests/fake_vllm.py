"""A stand-in for the parts of vLLM that the engine `vllm` calls, with its names and its manners.

It answers a prompt with its own tokens, last one first, then the end of the text. A step computes
one token of each sequence, or up to eight of a prompt; a sequence of a higher number goes first,
as vLLM may order them however it likes.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
from typing import Any

import pytest

CHUNK = 8


class RequestOutputKind(enum.Enum):
    DELTA = 1


@dataclasses.dataclass
class StructuredOutputsParams:
    json: str | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        if self.regex == "(":
            raise ValueError("unbalanced: (")


class SamplingParams:
    def __init__(self, **given: Any) -> None:
        self.__dict__ |= given


@dataclasses.dataclass
class EngineArgs:
    model: str = ""
    dtype: str = "auto"
    max_model_len: int = 0
    max_num_seqs: int = 0
    scheduling_policy: str = "fcfs"
    generation_config: str = "auto"
    disable_log_stats: bool = False
    structured_outputs_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    enable_lora: bool = False
    max_loras: int = 0
    max_lora_rank: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    quantization: str | None = None


@dataclasses.dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclasses.dataclass
class Logprob:
    logprob: float
    rank: int


@dataclasses.dataclass
class _Request:
    outer_id: str
    prompt: list[int]
    params: Any
    priority: int
    left: list[int]
    computed: int = 0


class _Scheduler:
    """What vLLM's scheduler shows of itself."""

    def __init__(self) -> None:
        self.requests: dict[str, _Request] = {}

    def schedule(self, throttled: bool = False) -> Any:
        counts = {}
        for key, request in reversed(self.requests.items()):
            missing = len(request.prompt) - request.computed
            counts[key] = min(CHUNK, missing) if missing > 0 else 1
        return types.SimpleNamespace(num_scheduled_tokens=counts)


class LLMEngine:
    started: list[EngineArgs] = []  # noqa: RUF012  (for tests to see)
    requests: list[dict[str, Any]] = []  # noqa: RUF012
    eos = 0

    def __init__(self) -> None:
        self.scheduler = _Scheduler()
        core = types.SimpleNamespace(scheduler=self.scheduler)
        self.engine_core = types.SimpleNamespace(engine_core=core, shutdown=lambda: None)
        self.aborted: list[str] = []

    @classmethod
    def from_engine_args(cls, arguments: EngineArgs) -> LLMEngine:
        if arguments.tensor_parallel_size > 1:
            raise ValueError("World size (2) is larger than the number of available GPUs (1).")
        cls.started.append(arguments)
        return cls()

    def add_request(
        self, request_id: str, prompt: Any, params: Any, *, lora_request: Any, priority: int
    ) -> str:
        self.requests.append({"prompt": prompt, "params": params, "lora": lora_request})
        ids = prompt["prompt_token_ids"]
        # The id inside is another than the one outside.
        request = _Request(request_id, ids, params, priority, [self.eos, *ids])
        self.scheduler.requests[f"{request_id}-x"] = request
        return f"{request_id}-x"

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            del self.scheduler.requests[f"{request_id}-x"]

    def step(self) -> list[Any]:
        made = self.scheduler.schedule()
        outputs = []
        for key, count in made.num_scheduled_tokens.items():
            request = self.scheduler.requests[key]
            request.computed += count
            if request.computed >= len(request.prompt):
                outputs.append(self._output(key, request))
        return outputs

    def _output(self, key: str, request: _Request) -> Any:
        token, params = request.left.pop(), request.params
        num_made = len(request.prompt) + 1 - len(request.left)
        reason = "length" if num_made >= params.max_tokens else None
        if token in params.stop_token_ids and num_made > params.min_tokens:
            reason = "stop"
        if reason:
            del self.scheduler.requests[key]
        chosen = {token: Logprob(-0.5, 3), 1: Logprob(-0.1, 1), 2: Logprob(-0.2, 2)}
        new = types.SimpleNamespace(
            token_ids=[token],
            logprobs=None if params.logprobs is None else [chosen],
            finish_reason=reason,
        )
        scored = None if params.prompt_logprobs is None else []
        if scored is not None and num_made == 1:  # told with the first token, and then no more
            likely = {1: Logprob(-0.1, 1), 2: Logprob(-0.2, 2)}
            scored = [None, *({each: Logprob(-0.7, 5)} | likely for each in request.prompt[1:])]
        return types.SimpleNamespace(
            request_id=request.outer_id,
            outputs=[new],
            finished=reason is not None,
            prompt_logprobs=scored,
            num_cached_tokens=1,
        )


def install(monkeypatch: pytest.MonkeyPatch, *, version: str = "0.32.0") -> None:
    """Have `import vllm` find this."""
    LLMEngine.started.clear()
    LLMEngine.requests.clear()
    platform = types.SimpleNamespace(is_cpu=lambda: True)
    for name, content in {
        "vllm": {"__version__": version, "SamplingParams": SamplingParams},
        "vllm.sampling_params": {
            "RequestOutputKind": RequestOutputKind,
            "StructuredOutputsParams": StructuredOutputsParams,
        },
        "vllm.platforms": {"current_platform": platform},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.llm_engine": {"LLMEngine": LLMEngine},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
