"""The engine in flight: every step computes the next tokens of all rows, packed together."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import torch
from torch import Tensor

from app.books.shares import decode_weights, share
from app.config.settings import ModelSettings
from app.engines.base import NOT_FINITE, Breakdown, Generation, NewTokens, Progress, Sequence
from app.engines.checkpoint.generation_config import load_rules
from app.engines.device import give_back_memory, pick_device, ran_out_of_memory, use_threads
from app.engines.inflight import library, native, scoring
from app.engines.inflight.attention import Packed, PortableStep, Step, pack, run, upload
from app.engines.inflight.budget import PromptBudget
from app.engines.inflight.cache import BLOCK, KVCache, LayerShape, blocks_for
from app.engines.inflight.fused import FusedLayer
from app.engines.inflight.graphs import CudaRecorder
from app.engines.inflight.launcher import Flight, Landed, Launcher
from app.engines.inflight.loading import load_decoder
from app.engines.inflight.memory import blocks_within
from app.engines.inflight.scheduler import Row, Scheduler, Segment
from app.engines.inflight.staging import PENDING
from app.engines.joining import JoiningEngine
from app.engines.sampling.grammar import Compiling, Grammars, wait_any
from app.engines.sampling.sampler import BAD_ROW, RowSampler, Sampled
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import load_tokenizer
from app.errors import (
    ConfigError,
    ContextLengthExceeded,
    InvalidSchema,
    OutOfMemory,
    RequestError,
)
from app.jobs import FinishReason

TOKENS_PER_FETCH: Final = {"cpu": 16, "cuda": 256}
"""Tokens whose arithmetic takes as long as fetching the weights once: sets a step's fixed part."""

LEAST_COPIED: Final = {"cpu": 1, "cuda": 16}
"""Tokens that are rather copied than computed: on a CUDA device launches are what takes time."""

_COMPILE_WAIT_S: Final = 0.02

WEIGHTS: Final = ("full", "int8")

_NOTHING: Final = Sampled(torch.empty(0, dtype=torch.int64), [])


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """`[models.NAME.options]` of this engine."""

    cache_tokens: int = 0  #: size of the KV cache; 0 takes cache_share of the free memory
    cache_share: float = 0.0  #: 0 takes 0.25 of free host memory, or 0.9 of what a device has left
    stall_ms: float = 200.0  #: about the longest step that prompts may cause
    prefill_tokens: int = 0  #: prompt tokens of a step, if not by stall_ms
    weights: str = "full"  #: full, or int8: half the memory; on CPUs with VNNI less time, too

    @classmethod
    def of(cls, settings: ModelSettings) -> Options:
        unknown = settings.options.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"The engine inflight has no option {', '.join(sorted(unknown))}.")
        for name, value in settings.options.items():
            if name == "weights":
                if value not in WEIGHTS:
                    raise ConfigError(
                        f"The option weights of the engine inflight is {' or '.join(WEIGHTS)}."
                    )
            elif not isinstance(value, int | float) or value < 0:
                raise ConfigError(
                    f"The option {name} of the engine inflight is a number from 0 on."
                )
        return cls(**settings.options)


class InflightEngine(JoiningEngine):
    """Any decoder of transformers, run packed over a block cache. Implements `base.Engine`."""

    @property
    def kernels(self) -> str:
        """What computes, for people."""
        if self._device.type != "cpu":
            return "CUDA"
        if self._kernel is None:
            return "torch" if library.library() else library.built().state
        fused = any(isinstance(each, FusedLayer) for each in self._model.modules())
        return f"{library.built().state}: attention{', layers' if fused else ''}"

    def __init__(
        self, folder: Path, settings: ModelSettings, device: str, threads: int, progress: Progress
    ) -> None:
        super().__init__()
        options = Options.of(settings)
        self._device = pick_device(device)
        use_threads(threads)
        self._tokenizer = load_tokenizer(folder, settings)
        self._context_tokens = self._tokenizer.context_tokens
        self._rules = load_rules(folder, settings)
        self._model, layers, vocab_size = load_decoder(
            folder, settings.dtype, options.weights, self._device, self._context_tokens
        )
        self._budget = PromptBudget(options.stall_ms, options.prefill_tokens)
        num_rows = settings.max_batch_size
        ends = self._tokenizer.eos_token_ids
        self._sampler = RowSampler(
            num_rows, vocab_size, self._device, self._rules, ends, native.largest
        )
        enough = num_rows * blocks_for(self._context_tokens)
        num_blocks = min(self._num_blocks(options, layers, num_rows), enough)
        least_copied = LEAST_COPIED[self._device.type]
        self._scheduler = Scheduler(num_rows, num_blocks, self._context_tokens, least_copied)
        paged = self._device.type == "cuda"
        self._cache = KVCache(layers, num_blocks, self._model.dtype, self._device, paged=paged)
        self._kernel = native.load(self._cache)
        self._launcher: Launcher | None = None
        if paged:
            self._launcher = self._launcher_for(layers, self._cache, self._scheduler.tables)
            self._launcher.record(self._budget.most, CudaRecorder())
        self._flight: Flight | None = None
        self._progress = progress
        self._rows: dict[int, Row] = {}
        self._grammars = Grammars(self._tokenizer)
        self._compiling: dict[int, Compiling] = {}  #: of rows that the scheduler does not have yet
        self._arrivals = itertools.count()
        self._ended: list[Generation] = []  # to come back from the next step
        self._leaving: list[Row] = []  # they have ended, and a step that they are in has not
        self._cancelled: set[int] = set()

    def admit(self, batch_id: str, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            generation = Generation(
                sequence.id,
                FinishReason.ERROR,
                input_tokens=len(sequence.prompt_token_ids),
                breakdown=(breakdown := Breakdown()),
                started_ns=time.monotonic_ns(),
            )
            try:
                self._check(sequence)
            except RequestError as error:
                self._end(generation, FinishReason.ERROR, (error.code, error.message))
                continue
            row = self._row(batch_id, sequence, generation, breakdown)
            self._rows[sequence.id] = row
            if row.params.grammar is None:
                self._scheduler.add(row)
            else:
                self._compiling[sequence.id] = self._grammars.compile(row.params.grammar)

    def step(self) -> list[Generation]:
        """Compute the next tokens of all rows; the sequences that ended come back.

        With a launcher this is one step ahead of what it returns: it launches a step, then waits
        for the one before.
        """
        try:
            return self._step()
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
        # Here, where the error no longer holds on to the step's tensors.
        self._drop_all()
        give_back_memory(self._device)
        raise OutOfMemory

    def _step(self) -> list[Generation]:
        self._drop_cancelled()
        if self._compiling:
            self._take_compiled()
        if self._flight is not None and (
            any(map(self._looks_back, self._flight.due))  # what may come follows from what came
            or any(map(scoring.is_due, self._rows.values()))  # it is timed from here on
        ):
            self._land()
        began = time.monotonic_ns()
        schedule = self._scheduler.schedule(self._budget.tokens(len(self._scheduler.running)))
        for row in schedule.preempted:
            row.breakdown.preemptions += 1
            row.gave_way_ns = began
        flight = None
        if schedule.segments:
            if schedule.copies:
                self._cache.copy(schedule.copies)
            for row in schedule.joined:
                self._join(row)
            flight = self._launch(schedule.segments, began)
        self._land()
        self._flight = flight
        if self._launcher is None:
            self._land()
        return self._take_ended()

    def cancel(self, sequence_id: int) -> None:
        self._cancelled.add(sequence_id)

    @property
    def has_work(self) -> bool:
        return bool(self._rows or self._ended or self._flight)

    @property
    def free_rows(self) -> int:
        """Some more than there are slots: whoever waits in here runs in the very next step."""
        return max(0, self._scheduler.num_rows * 5 // 4 - len(self._rows))

    def close(self) -> None:
        self._rows.clear()
        self._grammars.close()
        del self._model, self._cache, self._kernel, self._launcher, self._flight

    def _check(self, sequence: Sequence) -> None:
        prompt, params = sequence.prompt_token_ids, sequence.params
        if params is None:
            raise RequestError("This model generates text; it gives no embeddings.")
        if not prompt:
            raise RequestError("The prompt has no tokens.")
        self._tokenizer.check(prompt)
        room = min(self._context_tokens, self._scheduler.num_blocks * BLOCK)
        if sequence.max_total_tokens > room:
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt)} tokens and the answer may have "
                f"{params.max_tokens}; this engine has room for {room} together."
            )

    def _row(
        self, batch_id: str, sequence: Sequence, generation: Generation, breakdown: Breakdown
    ) -> Row:
        assert sequence.params is not None
        params, prompt = self._rules.merged(sequence.params), sequence.prompt_token_ids
        return Row(
            sequence=sequence,
            params=params,
            batch_id=batch_id,
            arrival=next(self._arrivals),
            generation=generation,
            output=Output(params, self._tokenizer, prompt, stream=sequence.stream),
            tokens=list(prompt),
            breakdown=breakdown,
        )

    def _take_ended(self) -> list[Generation]:
        ended, self._ended = self._ended, []
        return ended

    def _drop_cancelled(self) -> None:
        for sequence_id in list(self._cancelled):
            row = self._rows.get(sequence_id)
            if row is not None:
                self._cancelled.discard(sequence_id)
                self._leave(row, FinishReason.CANCELLED)

    def _take_compiled(self) -> None:
        """Let in the rows whose grammar is ready; if there are no others, wait a moment for it."""
        if len(self._compiling) == len(self._rows):
            wait_any(list(self._compiling.values()), _COMPILE_WAIT_S)
        for sequence_id, compiling in list(self._compiling.items()):
            row = self._rows[sequence_id]
            try:
                row.output.matcher = compiling.matcher()
            except InvalidSchema as error:
                self._leave(row, FinishReason.ERROR, (error.code, error.message))
            if row.output.matcher is not None:
                del self._compiling[sequence_id]
                self._scheduler.add(row)

    def _join(self, row: Row) -> None:
        """A row has a slot, for the first time or again."""
        if not (row.furthest or row.flights):
            row.generation.cached_tokens = row.computed
        _count_preempted(row)
        prompt, output = row.sequence.prompt_token_ids, row.output
        self._sampler.put(row.slot, row.params, prompt, output.token_ids, output.matcher)
        # Whatever seed was drawn stays with the row, should it lose its slot.
        row.params = dataclasses.replace(row.params, seed=self._sampler.seed_of(row.slot))
        if self._launcher is not None:
            self._launcher.put(row, self._sampler.seed_of(row.slot))

    def _launch(self, segments: list[Segment], began_ns: int) -> Flight | None:
        """Begin a step; from then on its tokens count as computed, and one more of each due row."""
        scored, segments = scoring.split(segments)
        if scored:
            segments, began_ns = self._score(scored, segments), time.monotonic_ns()
        if not segments:
            return None
        if self._launcher is not None:
            flight = self._launcher.launch(segments, began_ns)
        else:
            flight = self._compute(segments, began_ns)
        self._scheduler.advance(segments)
        for segment in segments:
            segment.row.flights += 1
        for row in flight.due:
            if len(row.tokens) + 1 < row.sequence.max_total_tokens:
                row.tokens.append(PENDING)
        return flight

    def _score(self, scored: list[Segment], segments: list[Segment]) -> list[Segment]:
        """Compute prompts that are scored; of a step's segments those whose rows are still here."""
        for segment in scored:
            began = time.monotonic_ns()
            is_sound = scoring.score(segment, self._scheduler.tables, self._logits)
            self._charge([segment], time.monotonic_ns() - began)
            if is_sound:
                self._scheduler.advance([segment])
            else:
                self._scheduler.lose(segment.row)
                self._leave(segment.row, FinishReason.ERROR, NOT_FINITE)
        return [segment for segment in segments if self._is_inside(segment.row)]

    def _land(self) -> None:
        """Wait for the step under way, if there is one, and give its rows what it brought."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        landed = flight.land()
        for segment in flight.segments:
            segment.row.flights -= 1
        self._charge(flight.segments, landed.device_ns)
        self._give(flight.due, landed.tokens, landed.sampled)
        self._ended += [row.generation for row in self._leaving if not row.flights]
        self._leaving = [row for row in self._leaving if row.flights]
        self._progress()

    def _compute(self, segments: list[Segment], began_ns: int) -> Flight:
        """One pass of the model on the host, and the next token of the rows that are due."""
        due = [segment.row for segment in segments if segment.is_last]
        with torch.inference_mode():
            logits = self._logits(pack(segments, self._scheduler.tables))
            # A step of unfinished prompts alone has nothing to sample.
            sampled = self._sample(logits, due) if due else _NOTHING
        landed = Landed(sampled.tokens.tolist(), sampled, time.monotonic_ns() - began_ns)
        return Flight(segments, due, began_ns, lambda: landed)

    def _sample(self, logits: Tensor, due: list[Row]) -> Sampled:
        return self._sampler.sample(logits, self._sampler.plan([row.slot for row in due]))

    def _logits(self, packed: Packed) -> Tensor:
        """[ends, vocab]"""
        if self._launcher is not None:
            return self._launcher.read(packed)
        arrays = packed.token_ids, packed.positions, packed.ends
        token_ids, positions, ends = upload(arrays, self._device)
        return run(self._model, self._attention(packed), token_ids, positions, ends)

    def _attention(self, packed: Packed) -> Step:
        tables = self._scheduler.tables
        if self._kernel is not None:
            return native.NativeStep(self._kernel, packed, tables)
        return PortableStep.of(self._cache, packed, tables)

    def _give(self, due: list[Row], tokens: list[int], sampled: Sampled) -> None:
        """Give each row its token; those that end with it leave."""
        now = time.monotonic_ns()
        for place, logprob in sampled.logprobs().items():
            if tokens[place] != BAD_ROW and self._is_inside(due[place]):
                generation = due[place].generation
                generation.logprobs = generation.logprobs or []
                generation.logprobs.append(logprob)
        for row, token in zip(due, tokens, strict=True):
            if not self._is_inside(row):
                continue  # it ended with its last token, which was not read when this was launched
            if token == BAD_ROW:
                self._scheduler.lose(row)
                self._leave(row, FinishReason.ERROR, NOT_FINITE)
                continue
            self._scheduler.vouch(row)
            place = len(row.sequence.prompt_token_ids) + len(row.output.token_ids)
            row.tokens[place:] = [token, *row.tokens[place + 1 :]]  # it was pending, or is the last
            if len(row.output.token_ids) == 0:
                row.generation.first_token_ns = now
            reason = row.output.append(token)
            if row.sequence.stream:
                scored = (row.generation.logprobs or ())[-1:]  # it was added just now
                new = NewTokens(row.sequence.id, (token,), row.output.take_text(), (*scored,))
                self._new_tokens.append(new)
            if reason is not None:
                self._leave(row, reason, row.output.error)

    def _looks_back(self, row: Row) -> bool:
        return bool(row.output.matcher) or self._sampler.looks_back(row.slot)

    def _is_inside(self, row: Row) -> bool:
        return self._rows.get(row.sequence.id) is row

    def _leave(self, row: Row, reason: FinishReason, error: tuple[str, str] | None = None) -> None:
        if self._compiling.pop(row.sequence.id, None) is None:
            self._scheduler.remove(row)
        del self._rows[row.sequence.id]
        _count_preempted(row)
        if row.sequence.stream and (rest := row.output.take_rest()):
            self._new_tokens.append(NewTokens(row.sequence.id, (), rest))
        generation = row.generation
        generation.token_ids, generation.text = row.output.token_ids, row.output.text
        if row.flights:  # it pays for the step that it is in, and comes back with that
            self._leaving.append(row)
            _finish(generation, reason, error)
        else:
            self._end(generation, reason, error)

    def _end(
        self, generation: Generation, reason: FinishReason, error: tuple[str, str] | None = None
    ) -> None:
        self._ended.append(generation)
        _finish(generation, reason, error)

    def _drop_all(self) -> None:
        """Forget every sequence, wherever the step was when it broke off."""
        flight, self._flight = self._flight, None
        if flight is not None:
            try:
                flight.land()  # what it writes to is given away
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
        self._scheduler.clear()
        self._rows.clear()
        self._compiling.clear()
        self._leaving.clear()
        self._ended.clear()
        self._new_tokens.clear()

    def _charge(self, segments: list[Segment], device_ns: int) -> None:
        """Share the step's time: fetching the weights equally, a row's own tokens to the row."""
        counts = [segment.count for segment in segments]
        self._budget.observe(sum(counts), device_ns)
        weights = decode_weights(counts, fixed=TOKENS_PER_FETCH[self._device.type], per_token=1)
        for segment, part in zip(segments, share(device_ns, weights), strict=True):
            row, end = segment.row, segment.start + segment.count
            row.generation.device_ns += part
            if segment.start < len(row.sequence.prompt_token_ids) or segment.start < row.furthest:
                _break_down(segment, part)
            stats = self._stats_of(row.batch_id)
            stats.rows += 1
            stats.useful_tokens += max(0, end - max(segment.start, row.furthest))
            stats.padded_tokens += segment.count
            row.furthest = max(end, row.furthest)
            stats.device_ns += part

    def _launcher_for(
        self, layers: list[LayerShape], cache: KVCache, tables: np.ndarray
    ) -> Launcher:
        most = self._budget.most + len(tables)
        return Launcher(self._model, layers, cache, self._sampler, tables, most)

    def _num_blocks(self, options: Options, layers: list[LayerShape], num_rows: int) -> int:
        """Blocks that fit into the cache's budget."""
        if options.cache_tokens:
            return max(1, options.cache_tokens // BLOCK)
        block_bytes = sum(layer.block_bytes(self._model.dtype) for layer in layers)
        if self._device.type == "cuda":
            free, peak = self._rehearse(layers, num_rows)
            return blocks_within(free, peak, options.cache_share or 0.9, block_bytes)
        free = psutil.virtual_memory().available
        return int(free * (options.cache_share or 0.25)) // block_bytes

    def _rehearse(self, layers: list[LayerShape], num_rows: int) -> tuple[int, int]:
        """Bytes that the device has free, and that the largest step takes of them."""
        tokens = self._budget.most + num_rows
        cache = KVCache(layers, 1, self._model.dtype, self._device, paged=True)
        launcher = self._launcher_for(layers, cache, np.zeros((num_rows, 1), np.int32))
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        launcher.rehearse(tokens)
        peak = torch.cuda.max_memory_allocated(self._device) - before
        del launcher, cache
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0], peak


def _break_down(segment: Segment, device_ns: int) -> None:
    """Note what a segment's time was for, by its tokens: computed before, prompt, or output."""
    row, end = segment.row, segment.start + segment.count
    new = min(end, max(segment.start, row.furthest))
    prompt = max(0, min(end, len(row.sequence.prompt_token_ids)) - new)
    recomputed_ns, prefill_ns, _ = share(
        device_ns, [new - segment.start, prompt, end - new - prompt]
    )
    row.breakdown.recomputed_ns += recomputed_ns
    row.breakdown.prefill_ns += prefill_ns


def _count_preempted(row: Row) -> None:
    """The row has a slot again, or leaves without one."""
    if row.gave_way_ns:
        row.breakdown.preempted_ns += time.monotonic_ns() - row.gave_way_ns
        row.gave_way_ns = 0


def _finish(
    generation: Generation, reason: FinishReason, error: tuple[str, str] | None = None
) -> None:
    generation.finish_reason = reason
    generation.finished_ns = time.monotonic_ns()
    if error is not None:
        generation.error_code, generation.error_message = error
