"""vLLM's engine, stepped here: one call of `step` is one step of its scheduler.

It runs inside the engine process, whose interpreter then is one that has vLLM; ranks of a model on
several devices are processes of its own, and end with it. Token ids go in and come out; texts and
stop strings are made here, as for every engine. vLLM says how many tokens each step computed for
each sequence, and its time is shared by them as that of our own steps is.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Final

from app.books.shares import decode_weights, share
from app.config.settings import ModelSettings
from app.engines.base import (
    Generation,
    NewTokens,
    Progress,
    Sequence,
    TokenLogprob,
    finite,
)
from app.engines.checkpoint.generation_config import load_rules
from app.engines.joining import JoiningEngine
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import FileTokenizer
from app.engines.vllm import sampling
from app.engines.vllm.options import largest_rank
from app.errors import ConfigError, ContextLengthExceeded, InvalidSchema, RequestError
from app.jobs import FinishReason, SamplingParams

LEAST_VERSION: Final = (0, 11)

TOKENS_PER_FETCH: Final = {"cpu": 16, "gpu": 256}
"""Tokens whose arithmetic takes as long as fetching the weights once: sets a step's fixed part."""

IDLE_S: Final = 0.001
"""Pause after a step that computed nothing, as while a grammar is compiled."""

ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its scheduler is stepped by us
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

_REASONS: Final = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclasses.dataclass(slots=True, eq=False)
class _Row:
    """A sequence inside."""

    sequence: Sequence
    batch_id: str
    generation: Generation
    output: Output
    key: str  #: vLLM's own id


class VllmEngine(JoiningEngine):
    """A model on one device or several. Implements `base.Engine`."""

    def __init__(
        self, folder: Path, settings: ModelSettings, device: str, threads: int, progress: Progress
    ) -> None:
        super().__init__()
        self._vllm = _import(device, threads)
        self.kernels = f"vLLM {self._vllm.__version__}"
        self._tokenizer = FileTokenizer(folder, settings)
        self._rules = load_rules(folder, settings)
        sampling.check_rules(self._rules)
        self._engine = _start(self._vllm, folder, settings, self._tokenizer.context_tokens)
        self._adapters = _adapters(settings)
        self._fetch = TOKENS_PER_FETCH["cpu" if _is_cpu() else "gpu"]
        self._max_rows = settings.max_batch_size
        self._progress = progress
        self._rows: dict[str, _Row] = {}  #: by the id that vLLM was given
        self._ended: list[Generation] = []  #: to come back from the next step
        self._cancelled: set[int] = set()  #: filled from another thread
        self._computed: dict[str, int] = {}  #: tokens of this step, by vLLM's own ids
        self._watch_scheduler()

    def _watch_scheduler(self) -> None:
        """Have every schedule noted: it says what is computed for whom."""
        scheduler = self._engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def noted(*args: Any, **kwargs: Any) -> Any:
            made = schedule(*args, **kwargs)
            self._computed = dict(made.num_scheduled_tokens)
            return made

        scheduler.schedule = noted

    def admit(self, batch_id: str, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            generation = Generation(
                sequence.id,
                FinishReason.ERROR,
                input_tokens=len(sequence.prompt_token_ids),
                started_ns=time.monotonic_ns(),
            )
            try:
                self._add(batch_id, sequence, generation)
            except RequestError as error:
                self._finish(generation, FinishReason.ERROR, (error.code, error.message))

    def step(self) -> list[Generation]:
        """One step of vLLM; the sequences that ended come back."""
        self._drop_cancelled()
        if self._rows:
            began = time.monotonic_ns()
            self._computed = {}
            outputs = self._engine.step()
            self._charge(time.monotonic_ns() - began)
            for output in outputs:
                if row := self._rows.get(output.request_id):
                    self._take(row, output)
            self._progress()
            if not self._computed:
                time.sleep(IDLE_S)
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, sequence_id: int) -> None:
        self._cancelled.add(sequence_id)

    @property
    def has_work(self) -> bool:
        return bool(self._rows or self._ended)

    @property
    def free_rows(self) -> int:
        return self._max_rows - len(self._rows)

    def close(self) -> None:
        self._rows.clear()
        self._engine.engine_core.shutdown()

    # ── in ───────────────────────────────────────────────────────────────────────────────────

    def _add(self, batch_id: str, sequence: Sequence, generation: Generation) -> None:
        """Raises `RequestError` for what this model cannot run."""
        params = self._checked(sequence)
        key = str(sequence.id)
        try:
            given = self._engine.add_request(
                key,
                {
                    "prompt_token_ids": list(sequence.prompt_token_ids),
                    "cache_salt": sequence.tenant,  # prefix caches never cross tenants
                },
                self._sampling(params),
                lora_request=self._adapter(sequence),
                priority=sequence.priority,
            )
        except ValueError:  # its words may quote the request
            if params.grammar is not None:
                raise InvalidSchema("vLLM cannot hold an output to this form.") from None
            raise RequestError("vLLM refuses the parameters of this request.") from None
        prompt, stream = sequence.prompt_token_ids, sequence.stream
        output = Output(params, self._tokenizer, prompt, stream=stream)
        self._rows[key] = _Row(sequence, batch_id, generation, output, given or key)

    def _checked(self, sequence: Sequence) -> SamplingParams:
        """Its parameters, with the model's own rules."""
        prompt, params = sequence.prompt_token_ids, sequence.params
        if params is None:
            raise RequestError("This model generates text; it gives no embeddings.")
        if not prompt:
            raise RequestError("The prompt has no tokens.")
        self._tokenizer.check(prompt)
        if sequence.max_total_tokens > self._tokenizer.context_tokens:
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt)} tokens and the answer may have {params.max_tokens}; "
                f"this model's context is {self._tokenizer.context_tokens} tokens."
            )
        sampling.check(params)
        return sampling.with_rules(params, self._rules, len(prompt))

    def _sampling(self, params: SamplingParams) -> Any:
        """vLLM's parameters."""
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        made = self._vllm.SamplingParams(
            **sampling.arguments(params, self._tokenizer.eos_token_ids),
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=(
                StructuredOutputsParams(**sampling.form(params.grammar)) if params.grammar else None
            ),
        )
        if params.bad_words:  # vLLM takes them as texts alone, and keeps them as token ids
            made._bad_words_token_ids = [list(word) for word in params.bad_words]
        return made

    def _adapter(self, sequence: Sequence) -> Any:
        """vLLM's request for a sequence's LoRA adapter, if it asks for one."""
        if not sequence.adapter:
            return None
        if sequence.adapter not in self._adapters:
            raise RequestError("This model has no such adapter.", param="model")
        return self._adapters[sequence.adapter]

    # ── out ──────────────────────────────────────────────────────────────────────────────────

    def _take(self, row: _Row, output: Any) -> None:
        """What a step brought for one sequence."""
        [new], params = output.outputs, row.sequence.params
        assert params is not None
        if new.token_ids and not row.generation.first_token_ns:
            row.generation.first_token_ns = time.monotonic_ns()
        row.generation.cached_tokens = output.num_cached_tokens or 0
        if output.prompt_logprobs:  # once, for all of the prompt but its first token
            most, prompt = params.prompt_logprobs or 0, row.sequence.prompt_token_ids
            given = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
            row.generation.prompt_logprobs = [_logprob(*each, most) for each in given]
        logprobs = new.logprobs or [None] * len(new.token_ids)
        reason: FinishReason | None = None
        taken: list[int] = []
        for token, chosen in zip(new.token_ids, logprobs, strict=True):
            reason = row.output.append(token)
            taken.append(token)
            if chosen is not None:
                row.generation.logprobs = row.generation.logprobs or []
                most = params.logprobs or 0
                row.generation.logprobs.append(_logprob(token, chosen, most))
            if reason is not None:
                break
        if row.sequence.stream:
            text = row.output.take_text()
            scored: tuple[TokenLogprob, ...] = ()
            if params.logprobs is not None and taken:
                scored = (*(row.generation.logprobs or ())[-len(taken) :],)
            self._new_tokens.append(NewTokens(row.sequence.id, (*taken,), text, scored))
        if reason is None and output.finished:
            reason = _REASONS.get(new.finish_reason, FinishReason.ERROR)
        if reason is not None:
            self._leave(row, reason, is_inside=not output.finished)

    def _leave(self, row: _Row, reason: FinishReason, *, is_inside: bool) -> None:
        del self._rows[str(row.sequence.id)]
        if is_inside:
            self._engine.abort_request([str(row.sequence.id)])
        if row.sequence.stream and (rest := row.output.take_rest()):
            self._new_tokens.append(NewTokens(row.sequence.id, (), rest))
        row.generation.token_ids, row.generation.text = row.output.token_ids, row.output.text
        error = row.output.error or ("engine_error", "vLLM could not run this sequence.")
        self._finish(row.generation, reason, error if reason is FinishReason.ERROR else None)

    def _finish(
        self, generation: Generation, reason: FinishReason, error: tuple[str, str] | None = None
    ) -> None:
        generation.finish_reason = reason
        generation.finished_ns = time.monotonic_ns()
        if error is not None:
            generation.error_code, generation.error_message = error
        self._ended.append(generation)

    def _drop_cancelled(self) -> None:
        for sequence_id in list(self._cancelled):
            if row := self._rows.get(str(sequence_id)):
                self._cancelled.discard(sequence_id)
                self._leave(row, FinishReason.CANCELLED, is_inside=True)

    def _charge(self, step_ns: int) -> None:
        """Share the step's time by what it computed: as `inflight` does. A step that computed
        nothing is paid by all who wait inside, in equal parts."""
        rows = [row for row in self._rows.values() if self._computed.get(row.key)]
        counts = [self._computed[row.key] for row in rows]
        weights = decode_weights(counts, fixed=self._fetch, per_token=1)
        if not rows:
            rows = list(self._rows.values())
            counts = weights = [0] * len(rows)
        for row, count, part in zip(rows, counts, share(step_ns, weights), strict=True):
            row.generation.device_ns += part
            stats = self._stats_of(row.batch_id)
            stats.rows += 1
            stats.useful_tokens += count
            stats.padded_tokens += count
            stats.device_ns += part


def _logprob(token: int, found: Mapping[int, Any], most: int) -> TokenLogprob:
    """vLLM names the chosen token and the `most` likeliest ones in one table."""
    ranked = sorted(found.items(), key=lambda each: each[1].rank)
    top = tuple((id_, finite(each.logprob)) for id_, each in ranked if each.rank <= most)
    return TokenLogprob(token, finite(found[token].logprob), top)


# ── the start ───────────────────────────────────────────────────────────────────────────────────


def _import(device: str, threads: int) -> Any:
    """vLLM, set up for this device. Raises `ConfigError` for one that is too old."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    kind, _, index = device.partition(":")
    if index:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", index)
    if threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    import vllm

    version = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    if len(version) == 2 and version < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ConfigError(
            f"The engine vllm needs vLLM {least} or newer; {vllm.__version__} is here."
        )
    if kind != "auto" and (kind == "cpu") != _is_cpu():
        built = "CPUs" if _is_cpu() else "accelerators"
        raise ConfigError(f"worker.device is {device}, but this vLLM is built for {built}.")
    return vllm


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _start(vllm: Any, folder: Path, settings: ModelSettings, context_tokens: int) -> Any:
    """vLLM's engine with the model loaded."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    options = {name: value for name, value in settings.options.items() if name != "python"}
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in options.keys() - known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"vLLM {vllm.__version__} has no engine argument {name}{hint}")
    arguments = {
        "model": str(folder),
        "dtype": settings.dtype,
        "max_model_len": context_tokens,
        "max_num_seqs": settings.max_batch_size,
        "scheduling_policy": "priority",
        "generation_config": "vllm",  # what a request leaves out is decided before it comes here
        "disable_log_stats": True,
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
    }
    if settings.adapters:
        arguments |= {
            "enable_lora": True,
            # One slot stays empty: on CPUs vLLM gives rows without an adapter the last one's.
            "max_loras": len(settings.adapters) + 1,
            "max_lora_rank": max(8, largest_rank(settings)),
        }
    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments | options))
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"vLLM cannot start with this model and these options: {reason[-1]}"
        ) from error


def _adapters(settings: ModelSettings) -> dict[str, Any]:
    """vLLM's request for each adapter, by our name of it."""
    if not settings.adapters:
        return {}
    from vllm.lora.request import LoRARequest

    return {
        name: LoRARequest(name, number, str(Path(folder).expanduser()))
        for number, (name, folder) in enumerate(settings.adapters.items(), start=1)
    }
