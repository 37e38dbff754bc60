"""The jobs inside the engine: which sequence belongs to which job, and what has been answered.

Some are there and have not begun: they go on when those of their model before them are over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from app.books.shares import share
from app.engines.base import Sequence
from app.worker.engine.wire import Stepped
from app.worker.work import Batch, Job


class Running:
    """Owns the map from sequence ids to jobs. Ids are never used twice in a worker."""

    def __init__(self) -> None:
        self._owners: dict[int, tuple[Job, int]] = {}
        self._rows: Counter[str] = Counter()  #: sequences inside, by model
        self._batches: dict[str, Batch] = {}  #: of which some are inside, by id
        self._left: Counter[str] = Counter()  #: how many
        self._waiting: dict[str, list[Job]] = {}  #: by model, those that have not begun
        self._next_id = 1
        self.told_ns = 0  #: device time that this engine process has told of
        self.solo: Job | None = None  #: the one job inside, if nothing was beside it since it came

    def enter(self, jobs: Iterable[Job], *, waits: bool = False) -> list[Sequence]:
        """Number the sequences of jobs that are about to be handed to the engine.

        `waits`: they begin when those of their model that are inside are over.
        """
        entered: list[Sequence] = []
        jobs = list(jobs)
        if waits:
            self._waiting[jobs[0].model] = jobs
        else:
            self.solo = jobs[0] if len(jobs) == 1 and not self._owners else None
        for job in jobs:
            for place, sequence in enumerate(job.sequences(self._next_id)):
                self._owners[sequence.id] = (job, place)
                entered.append(sequence)
            self._next_id += job.num_sequences
            self._rows[job.model] += job.num_sequences
            batch = job.claimed_run.batch
            self._batches[str(batch.id)] = batch
            self._left[str(batch.id)] += job.num_sequences
        return entered

    def _take(self, sequence_id: int) -> tuple[Job, int]:
        job, place = self._owners.pop(sequence_id)
        self._rows[job.model] -= 1
        id_ = str(job.claimed_run.batch.id)
        self._left[id_] -= 1
        if not self._left[id_]:
            del self._left[id_], self._batches[id_]
        return job, place

    def answer(self, event: Stepped) -> list[Job]:
        """Take the engine's answers; returns the jobs that have all of theirs now."""
        over: list[Job] = []
        for stats in event.stats:
            if batch := self._batches.get(stats.batch_id):
                batch.useful_tokens += stats.useful_tokens
                batch.padded_tokens += stats.padded_tokens
        for generation in event.generations:
            job, place = self._take(generation.sequence_id)
            run = job.claimed_run
            run.generations[place] = generation
            run.device_ns += generation.device_ns
            run.batch.device_ns += generation.device_ns
            run.batch.num_sequences += 1
            self.told_ns += generation.device_ns
            if run.is_over:
                over.append(job)
        return over

    def ended(self, jobs: Iterable[Job]) -> list[Batch]:
        """The batches of these jobs of which nobody is inside any more."""
        batches = {str(job.claimed_run.batch.id): job.claimed_run.batch for job in jobs}
        return [batch for id_, batch in batches.items() if id_ not in self._batches]

    def begin(self, model: str) -> list[Job]:
        """Those that begin now, because the last one before them is over."""
        waiting = self._waiting.get(model, [])
        if any(job.model == model and job not in waiting for job, _ in self._owners.values()):
            return []
        begun = self._waiting.pop(model, [])
        if begun:
            others = any(job.model != model for job, _ in self._owners.values())
            self.solo = begun[0] if len(begun) == 1 and not others else None
        return begun

    def is_waiting(self, job: Job) -> bool:
        """Whether it has not begun."""
        return job in self._waiting.get(job.model, [])

    def leave_waiting(self) -> list[Job]:
        """Take out all that have not begun: the engine is lost."""
        waiting = [job for jobs in self._waiting.values() for job in jobs]
        self._waiting = {}
        for id_ in [id_ for id_, (job, _) in self._owners.items() if job in waiting]:
            self._take(id_)
        return waiting

    def num_rows(self, model: str) -> int:
        """Sequences of this model that are inside."""
        return self._rows[model]

    def jobs(self, model: str) -> list[Job]:
        return list(dict.fromkeys(job for job, _ in self._owners.values() if job.model == model))

    def sequence_ids(self, job: Job) -> list[int]:
        return [id_ for id_, (owner, _) in self._owners.items() if owner is job]

    def leave(self, sequence_ids: Iterable[int] | None = None, took_ns: int = 0) -> list[Job]:
        """Take out the jobs of these sequences, or of all: the engine dropped them. They took
        `took_ns` of the device's time without an answer, in equal parts."""
        dropped = self._owners if sequence_ids is None else sequence_ids
        rows = Counter(self._take(id_)[0] for id_ in list(dropped))
        self.told_ns += took_ns
        jobs = list(rows)
        parts = share(took_ns, list(rows.values())) if jobs else []
        for job, part in zip(jobs, parts, strict=True):
            job.claimed_run.forget_answers(part)
        self._waiting = {
            model: left
            for model, waiting in self._waiting.items()
            if (left := [job for job in waiting if job not in jobs])
        }
        return jobs

    def leave_dead(self, spent_ns: int) -> list[Job]:
        """Take out all: their engine process is dead, and had spent so much since its start."""
        jobs = self.leave(took_ns=max(0, spent_ns - self.told_ns) if self._owners else 0)
        self.told_ns = 0
        return jobs
