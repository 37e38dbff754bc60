"""A contender's engine, in a process of its own as in a worker, and what it makes of prompts.

Batches are closed by the rule of the worker, so that a model's limits and waits count here as
there; there is no queue and no database.
"""

from __future__ import annotations

import itertools
import select
import shutil
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from uuid import UUID

import psutil

from app.books.energy import EnergyMethod, Taken
from app.engines import registry
from app.engines.base import Generation, Sequence
from app.engines.catalog import CatalogModel
from app.errors import ConfigError, EngineCrashed, EngineError, OutOfMemory
from app.jobs import new_id
from app.trials.contender import Contender
from app.trials.questions import Asked
from app.worker.batcher import Batcher, Candidate, Capacity, Limits
from app.worker.energy.meter import EnergyMeter, Joules
from app.worker.energy.source import choose
from app.worker.engine.host import EngineHost
from app.worker.engine.wire import Broken, DidNotFit, LoadModels, Ready, ServedModel, Stepped

NOT_KNOWN: Final = Taken(0, EnergyMethod.ABSENT)

TURN_S: Final = 1.0
"""Longest sleep between two looks at whether the engine is stuck."""


@dataclass(slots=True)
class _Batch:
    """One that was closed."""

    num_rows: int
    num_left: int
    device_ns: int = 0


@dataclass(slots=True)
class Run:
    """Prompts that were run to their end, in the order in which they were asked."""

    answers: list[Generation]
    latencies_ns: list[int]  #: from a prompt's coming to its answer
    wall_ns: int
    energy: Taken = NOT_KNOWN  #: of the steps, and what lay between them

    @property
    def device_ns(self) -> int:
        return sum(each.device_ns for each in self.answers)

    @property
    def input_tokens(self) -> int:
        return sum(each.input_tokens for each in self.answers)

    @property
    def output_tokens(self) -> int:
        return sum(each.output_tokens for each in self.answers)

    @property
    def num_failed(self) -> int:
        return sum(each.error_code is not None for each in self.answers)


@dataclass(slots=True)
class Trial:
    """Use it in a `with`: the process ends with it."""

    contender: Contender
    model: CatalogModel
    load_ns: int = 0
    kernels: str = ""  #: what computes, in the engine's own words
    _host: EngineHost = field(init=False)
    _meter: EnergyMeter = field(init=False)
    _batcher: Batcher = field(init=False)
    _waiting: dict[UUID, tuple[int, Sequence]] = field(default_factory=dict)  #: with its place
    _inside: dict[int, tuple[int, _Batch]] = field(default_factory=dict)  #: places, by sequence
    _ids: Iterator[int] = field(default_factory=itertools.count)
    _runs: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._host = _host(self.contender, self.model)
        self._batcher = Batcher({self.contender.model: Limits.of(self.contender.own)})

    def __enter__(self) -> Trial:
        """Raises `EngineError` or `ConfigError` if the model does not load."""
        try:
            self._host.start()
            self._meter = EnergyMeter(choose(self.contender.settings), self._host.hours)
            while not self._host.ready:
                self._wait(TURN_S)
                for event in self._host.events():
                    match event:
                        case Ready(engines=engines, load_ns=load_ns):
                            [facts] = engines.values()
                            self.load_ns, self.kernels = load_ns, facts.kernels
                        case Broken(reason=reason, will_not_load=True):
                            raise ConfigError(f"{self.contender.given}: {reason}")
                        case Broken(reason=reason):
                            raise EngineCrashed(f"{self.contender.given}: {reason}.")
                if self._host.is_stuck():
                    raise EngineError(
                        f"{self.contender.given}: its engine was not loaded in the time that "
                        "worker.load_timeout_s allows."
                    )
        except BaseException:
            self._host.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._host.kill()

    def alone(self, asked: Seq[Asked]) -> Run:
        """Each prompt by itself, one after the other."""
        runs = [self.together([each]) for each in asked]
        return Run(
            [answer for run in runs for answer in run.answers],
            [latency for run in runs for latency in run.latencies_ns],
            sum(run.wall_ns for run in runs),
        )

    def together(self, asked: Seq[Asked], arrivals_ns: Seq[int] = ()) -> Run:
        """All prompts, each at its time from now on; without times all at once, as from a queue
        that was full before. What an earlier run has computed is of no use to this one."""
        tenant = f"run-{next(self._runs)}"
        energy_before = self._read_energy()
        began = time.monotonic_ns()
        coming = deque(
            (began + arrival_ns, place, self._sequence(each, tenant))
            for place, (each, arrival_ns) in enumerate(
                zip(asked, arrivals_ns or [0] * len(asked), strict=True)
            )
        )
        arrived = {place: arrival_ns for arrival_ns, place, _ in coming}
        answers: dict[int, Generation] = {}
        latencies = [0] * len(asked)
        while len(answers) < len(asked):
            while coming and coming[0][0] <= time.monotonic_ns():
                self._add(*coming.popleft())
            self._admit()
            self._wait(self._pause_s(coming[0][0] if coming else None))
            for answer in self._heard():
                place = self._leave(answer)
                answers[place] = answer
                latencies[place] = (answer.finished_ns or time.monotonic_ns()) - arrived[place]
        wall_ns = time.monotonic_ns() - began
        energy = _taken(energy_before, self._read_energy())
        return Run([answers[place] for place in range(len(asked))], latencies, wall_ns, energy)

    def _sequence(self, asked: Asked, tenant: str) -> Sequence:
        return Sequence(
            next(self._ids),
            asked.tokens,
            asked.params,
            tenant=tenant,
            pooling=asked.pooling,
            token_type_ids=asked.type_ids,
        )

    def _read_energy(self) -> Joules:
        self._meter.read()
        return self._meter.joules()

    def _add(self, arrived_ns: int, place: int, sequence: Sequence) -> None:
        max_tokens = sequence.params.max_tokens if sequence.params else 0
        candidate = Candidate(
            new_id(),
            self.contender.model,
            1,
            len(sequence.prompt_token_ids),
            max_tokens,
            arrived_ns,
        )
        self._waiting[candidate.job_id] = place, sequence
        self._batcher.add(candidate)

    def _capacity(self) -> Capacity:
        model = self.contender.model
        return Capacity(
            self._host.free_rows(model), self._host.joins(model), is_empty=not self._host.busy
        )

    def _admit(self) -> None:
        model = self.contender.model
        while closed := self._batcher.close(model, self._capacity(), time.monotonic_ns()):
            members = [self._waiting.pop(member.job_id) for member in closed.members]
            batch = _Batch(len(members), len(members))
            self._inside |= {sequence.id: (place, batch) for place, sequence in members}
            self._host.admit(model, str(new_id()), [sequence for _, sequence in members])

    def _leave(self, answer: Generation) -> int:
        """The place of its prompt. The batcher hears of batches that are over."""
        place, batch = self._inside.pop(answer.sequence_id)
        batch.num_left -= 1
        batch.device_ns += answer.device_ns
        if not batch.num_left:
            self._batcher.note_ran(self.contender.model, batch.num_rows, batch.device_ns)
        return place

    def _pause_s(self, arrives_ns: int | None) -> float:
        """Until a batch is due or a prompt comes, if nothing is heard before."""
        capacity = self._capacity()
        due_ns = self._batcher.next_close_ns({self.contender.model: capacity})
        if capacity.free_rows < 1:
            due_ns = None
        due = [each for each in (due_ns, arrives_ns) if each is not None]
        return min(TURN_S, max(0, min(due) - time.monotonic_ns()) / 1e9) if due else TURN_S

    def _heard(self) -> Iterator[Generation]:
        """Answers that have come. Raises `EngineError` if no more will."""
        for event in self._host.events():
            match event:
                case Stepped(generations=generations):
                    yield from generations
                case DidNotFit():
                    raise OutOfMemory(
                        f"{self.contender.given}: a batch does not fit into memory; lower "
                        "max_batch_size or max_batch_tokens."
                    )
                case Broken(reason=reason):
                    raise EngineCrashed(f"{self.contender.given}: the engine ended: {reason}.")
        if self._host.is_stuck():
            raise EngineError(
                f"{self.contender.given}: the engine has shown no progress for as long as "
                "worker.step_timeout_s allows."
            )

    def _wait(self, seconds: float) -> None:
        """Until the engine process says something."""
        if (connection := self._host.connection) is None:
            return
        self._host.flush()
        writes = [connection] if connection.wants_write else []
        select.select([connection], writes, [], seconds)

    def peak_bytes(self) -> int:
        """Most memory of the host that the engine process, and what it started, has held at once;
        what they share is counted more than once. 0 where the system does not tell."""
        if self._host.pid is None:
            return 0
        try:
            first = psutil.Process(self._host.pid)
            return sum(_peak_bytes(each.pid) for each in (first, *first.children(recursive=True)))
        except psutil.Error:  # it has just ended
            return 0


def _taken(before: Joules, after: Joules) -> Taken:
    """All but what went by while nothing ran."""
    method = EnergyMethod.MEASURED
    if after.num_estimated > before.num_estimated:
        method = EnergyMethod.ESTIMATED
    if after.num_absent > before.num_absent:
        method = EnergyMethod.ABSENT
    spent = (each.parts.busy + each.parts.waste + each.parts.overhead for each in (after, before))
    return Taken(next(spent) - next(spent), method)


def _peak_bytes(pid: int) -> int:
    """VmHWM of proc_pid_status(5), which is in KiB."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _host(contender: Contender, model: CatalogModel) -> EngineHost:
    worker, settings = contender.settings.worker, contender.own
    python = registry.python_of(settings)
    if shutil.which(python) is None:
        raise ConfigError(
            f"{contender.given}: options.python names no program that can be run: {python}."
        )
    served = ServedModel(
        contender.model, model.folder, settings, registry.find(settings.engine).factory
    )
    builds = Path(contender.settings.cache_dir) / "kernels"
    return EngineHost(
        LoadModels((served,), worker.device, worker.threads, builds),
        load_timeout_s=worker.load_timeout_s,
        step_timeout_s=worker.step_timeout_s,
        python=python,
    )


def with_logprobs(asked: Seq[Asked]) -> list[Asked]:
    """The same, each token of the answers with its log-probability."""
    return [
        replace(each, params=each.params and replace(each.params, logprobs=0)) for each in asked
    ]


def to_read(asked: Seq[Asked], answers: Seq[Seq[int]], context_tokens: int) -> list[Asked]:
    """Prompts that end with given answers, whose tokens are scored and not written. As much of an
    answer as leaves room for the one token that an engine has to write."""
    read = []
    for each, tokens in zip(asked, answers, strict=True):
        assert each.params is not None
        whole = (*each.tokens, *tokens)[: context_tokens - 1]
        params = replace(each.params, max_tokens=1, prompt_logprobs=1)
        read.append(replace(each, tokens=whole, params=params))
    return read
