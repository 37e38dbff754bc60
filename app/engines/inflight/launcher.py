"""Steps on a device that computes while the host goes on.

    flight = launcher.launch(segments)  # returns before the step is done
    ...                                 # launch the next one, which needs this one's tokens
    landed = flight.land()              # waits for it

The tokens that a step samples stay on the device, by slot, and the next step takes them from there:
the host need not have read them. Work is in the order of launching, so a page or a slot that is
given up while a step runs may be given away at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.engines.inflight import staging
from app.engines.inflight.attention import Packed, run
from app.engines.inflight.cache import BLOCK, KVCache, LayerShape
from app.engines.inflight.drawing import draw
from app.engines.inflight.graphs import Graphs, Record, Work, exact_room, record_all, rooms
from app.engines.inflight.paged import PagedStep, Scratch, queries_of, taken
from app.engines.inflight.scheduler import Row, Segment
from app.engines.inflight.staging import END, ROW, SAMPLE_ROW, SLOT, Order, Room, Samplers
from app.engines.sampling.sampler import RowSampler, Sampled

_SETS: Final = 2
"""Of pinned memory: a step is staged while the one before it may be under way."""


@dataclass(frozen=True, slots=True)
class Landed:
    """What a step gave, for its due rows in their order."""

    tokens: list[int]
    sampled: Sampled  #: with what log probabilities were asked for
    device_ns: int


@dataclass(frozen=True, slots=True)
class Flight:
    """A step on its way. Land it before the second launch after its own."""

    segments: list[Segment]
    due: list[Row]
    began_ns: int
    _landing: Callable[[], Landed]

    def land(self) -> Landed:
        """Wait until it is done. Raises what the device raised."""
        return self._landing()


class Launcher:
    """Owns what the device knows between steps: staged numbers, and each slot's last token."""

    def __init__(
        self,
        model: PreTrainedModel,
        shapes: Seq[LayerShape],
        cache: KVCache,
        sampler: RowSampler,
        tables: np.ndarray,
        max_tokens: int,
    ) -> None:
        """`tables` [rows, pages] are read at each launch; a step has up to `max_tokens` tokens."""
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._tables = tables
        self._device = cache.keys[0].device
        self._num_rows = num_rows = len(tables)
        self._queries = queries_of(shapes)
        self._scratch = Scratch(shapes, num_rows, self._device)
        self._draws = Samplers(num_rows)
        size = Room(max_tokens, num_rows, max_tokens + num_rows, num_rows).size + tables.size
        on_cuda = self._device.type == "cuda"
        self._staged = [
            torch.zeros(size, dtype=torch.int32, pin_memory=on_cuda) for _ in range(_SETS)
        ]
        self._numbers = torch.zeros(size, dtype=torch.int32, device=self._device)
        self._answers = [
            torch.zeros(num_rows, dtype=torch.int64, pin_memory=on_cuda) for _ in range(_SETS)
        ]
        self._last = torch.zeros(num_rows + 1, dtype=torch.int64, device=self._device)
        self._clock = _cuda_clock if on_cuda else _host_clock
        self._turn = 0
        self.graphs = Graphs({})

    def record(self, max_tokens: int, record: Record) -> None:
        """Record a graph for each size of step, with up to `max_tokens` tokens of prompts."""

        def one(room: Room) -> Work:
            self._blank(room)
            with torch.inference_mode():
                return record(lambda: self._work(room))

        wanted = rooms(self._num_rows, max_tokens, self._queries)
        self.graphs = Graphs(record_all(wanted, one))

    def rehearse(self, tokens: int) -> None:
        """Run a step of so many tokens that belong to nobody: it takes the memory of any other."""
        room = Room(tokens, self._num_rows, tokens // self._queries + 1, self._num_rows)
        self._blank(room)
        with torch.inference_mode():
            self._work(room)

    def put(self, row: Row, seed: int) -> None:
        """The row has a slot."""
        self._draws.put(row.slot, row.params, seed)

    def launch(self, segments: Seq[Segment], began_ns: int) -> Flight:
        order = Order.of(segments, self._queries)
        due = [each.row for each in order.segments if each.is_last]
        room = self.graphs.fits(order) or exact_room(order, len(due))
        turn, self._turn = self._turn, (self._turn + 1) % _SETS
        size = self._stage(self._staged[turn], room, order, due)
        stop = self._clock()
        with torch.inference_mode():
            self._numbers[:size].copy_(self._staged[turn][:size], non_blocking=True)
            recorded = self.graphs.recorded.get(room)
            logits, tokens = recorded() if recorded else self._work(room)
            sampled = self._sample(logits, tokens, room, due)
            answer = self._answers[turn][: len(due)]
            answer.copy_(sampled.tokens, non_blocking=True)
        wait = stop()

        def landing() -> Landed:
            device_ns = wait()
            return Landed(answer.tolist(), sampled, device_ns)

        return Flight(order.segments, due, began_ns, landing)

    def read(self, packed: Packed) -> Tensor:
        """Logits [ends, vocab] of tokens that are all known, for those who measure."""
        rows, _, counts, starts = packed.segments.T.astype(np.int64)
        tiles = int((-(-counts // self._queries)).sum())
        room = Room(len(packed.token_ids), len(rows), tiles, 1)
        numbers = np.zeros(room.size + self._tables.size, np.int32)
        ids, tables, queries = packed.token_ids, self._tables, self._queries
        staging.write(room.views(numbers), ids, rows, starts, counts, 0, tables, queries)
        views = room.views(torch.from_numpy(numbers).to(self._device))
        taken_ids, positions, slots = taken(views.tokens, room.tokens, self._last)
        step = PagedStep(self._cache, self._scratch, room, views, positions, slots, queries)
        ends = torch.from_numpy(packed.ends).to(self._device)
        return run(self._model, step, taken_ids, positions, ends)

    def _stage(self, staged: Tensor, room: Room, order: Order, due: list[Row]) -> int:
        """Write what the device has to be told; how many numbers that is."""
        views = room.views(staged.numpy())
        num_pages = staging.fill(
            views, order, self._tables, self._cache.scrap, self._num_rows, self._queries
        )
        slots = np.array([row.slot for row in due], np.int64)
        prompts = (len(row.sequence.prompt_token_ids) for row in due)
        positions = [len(row.tokens) - prompt for row, prompt in zip(due, prompts, strict=True)]
        self._draws.fill(views.samples, slots, np.array(positions, np.int64))
        return room.size + num_pages

    def _blank(self, room: Room) -> None:
        """Stage a step without a segment, whose tokens are kept where nobody reads."""
        views = room.views(self._numbers.zero_())
        views.tokens[SLOT] = self._cache.scrap * BLOCK
        views.tokens[ROW] = self._num_rows
        views.samples[SAMPLE_ROW] = self._num_rows

    def _work(self, room: Room) -> tuple[Tensor, Tensor]:
        """One pass of the model and a draw from its logits, all on the device."""
        views = room.views(self._numbers)
        ids, positions, slots = taken(views.tokens, room.tokens, self._last)
        step = PagedStep(self._cache, self._scratch, room, views, positions, slots, self._queries)
        ends = views.samples[END, : room.samples].long()
        logits = run(self._model, step, ids, positions, ends)
        return logits, draw(logits, views.samples, self._last)

    def _sample(self, logits: Tensor, tokens: Tensor, room: Room, due: list[Row]) -> Sampled:
        """What was drawn, or drawn again where rows have penalties, a grammar or log probabilities;
        what a row draws of its own logits is the same both times."""
        slots = [row.slot for row in due]
        if not self._sampler.is_needed(slots):
            return Sampled(tokens[: len(due)])
        samples = room.views(self._numbers).samples
        return self._sampler.sample(
            logits[: len(due)],
            self._sampler.plan(slots),
            lambda adjusted: draw(adjusted, samples, self._last),
        )


def _cuda_clock() -> Callable[[], Callable[[], int]]:
    """Begins to measure the device's time; then ends, then waits and says how long, in ns."""
    began, ended = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    began.record()

    def stop() -> Callable[[], int]:
        ended.record()

        def wait() -> int:
            ended.synchronize()
            return int(began.elapsed_time(ended) * 1e6)

        return wait

    return stop


def _host_clock() -> Callable[[], Callable[[], int]]:
    """The same where the device is the host, which is done when it is told."""
    began = time.monotonic_ns()

    def stop() -> Callable[[], int]:
        took = time.monotonic_ns() - began
        return lambda: took

    return stop
