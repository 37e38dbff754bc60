"""What jobs may expect: their place in the queue, when they will have ended, and what they cost.

The queue, what ended lately and the workers are looked at once a second while anybody asks, by one
thread for all. Whatever is asked is answered from that look, in memory: a storm of polls costs
Postgres nothing. What was promised to a job is written with it, so that ended jobs tell, here and
in other API processes, also after a restart, what promises are worth.
"""

from __future__ import annotations

import enum
import logging
import math
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any, Final
from uuid import UUID

from app.books.calibration import Ended
from app.books.eta import Ahead, Eta, Experience, Pace, Start, start_of
from app.books.work import NOTHING, Size
from app.broker.queues import Layout
from app.config.settings import Settings
from app.errors import GristmillError
from app.jobs import LATEST, LIVE_PRIORITY, JobState
from app.store import loads
from app.store import outlook as store
from app.store.database import Database
from app.store.loads import Load
from app.store.outlook import EndedJob, Rung, Up
from app.store.reads import JobView
from app.store.submissions import NewJob
from app.store.tenancy import EVERYBODY, acting_for

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""From one look to the next while somebody asks."""
IDLE_S: Final = 5.0
"""The same while nobody has for `ASKED_S`."""
ASKED_S: Final = 3.0
LOOK_SHARE: Final = 20
"""Looking has at most one part in so many of the time: a queue of 400,000 takes a second."""
OLD_S: Final = 60.0
"""An older look says nothing any more, unless looks take so long that the next is not due yet."""

MOST_ENDED: Final = 2_000
"""Jobs that ended, of one look; of more the last."""
OVERLAP: Final = timedelta(seconds=2)
"""A job's end is stamped before it is committed: so far each look goes back behind the last."""
FIRST: Final = timedelta(days=7)
"""How far back the first look goes for what ended."""
MOST_OF_MODEL: Final = 200
"""Jobs of a model that is not among those, at the first look."""
MOST_WORKERS: Final = 1_000
WORKERS_SINCE: Final = timedelta(hours=1)


class Reason(enum.StrEnum):
    """Why nobody can say when a job will have ended."""

    NO_WORKER = "no_worker"  #: none that is up serves the model
    LOADING = "loading"  #: one loads it, and how long that takes was never measured
    NO_HISTORY = "no_history"  #: no job of the model has ended yet
    NOT_LOOKED = "not_looked"  #: the queue could not be looked at lately


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a job may expect. `eta` counts from `due_at`, when the job may run."""

    due_at: datetime
    position: int | None  #: 1 is next; None while it is not due or nothing is known
    eta: Eta | None
    reason: Reason | None  #: why there is no `eta`
    estimate_s: float = 0.0
    pace: Pace | None = None
    load_s: float | None = None  #: what the model takes to load, where no worker is up

    def after(self, seconds: float) -> datetime:
        """So long after it is due, or the latest time that there is."""
        left_s = (LATEST - self.due_at).total_seconds()
        return self.due_at + timedelta(seconds=min(seconds, left_s)) if left_s > 0 else LATEST


@dataclass(frozen=True, slots=True)
class Asked:
    """A job as far as its forecast depends on it."""

    model: str
    priority: int
    not_before: datetime | None
    input_tokens: int | None
    max_output_tokens: int | None


@dataclass(frozen=True, slots=True)
class _Lane:
    """What waits of a model and step of priority: see `store.ladder`."""

    keys: Sequence[tuple[datetime, UUID]] = ()  #: of jobs
    sizes: Sequence[Size] = ()  #: of all up to each of them
    total: Size = NOTHING
    a_second: Size = NOTHING  #: what comes, as in the last minute

    @classmethod
    def of(cls, rungs: Sequence[Rung]) -> _Lane:
        keys = tuple((rung.created_at, rung.id) for rung in rungs)
        sizes = tuple(map(_size_of, rungs))
        coming = rungs[-1].of_last_minute / rungs[-1].jobs / 60  # jobs like those that wait
        return cls(keys, sizes, sizes[-1], sizes[-1].times(coming))

    def since_when(self) -> list[tuple[float, float]]:
        """Since when how many of these wait."""
        before = [0.0, *(size.jobs for size in self.sizes)]
        return [
            (created_at.timestamp(), size.jobs - earlier)
            for (created_at, _), size, earlier in zip(self.keys, self.sizes, before, strict=False)
        ]

    def before(self, created_at: datetime, id: UUID) -> Size | None:
        """What waits before a job: exact at a rung, the middle between two. None if it came after
        the look."""
        place = bisect_left(self.keys, (created_at, id))
        if place == len(self.keys):
            return None
        upper = self.sizes[place]
        if self.keys[place] == (created_at, id):
            return upper.times((upper.jobs - 1) / upper.jobs)
        lower = self.sizes[place - 1] if place else NOTHING
        return (lower + upper).times(0.5)


NO_START: Final = Start(0, None, None)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A model, as it was looked at."""

    lanes: Mapping[int, _Lane] = field(default_factory=dict)  #: by step of priority
    running: Size = NOTHING
    workers: int = 0
    pace: Pace | None = None
    start: Start = NO_START


EMPTY: Final = _Lane()
UNSEEN: Final = _Seen()


class Outlook:
    """Owner of what was seen, and of what was learnt. Threads may share it."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._layout = Layout.of(settings)
        self._database = database
        self._looking = threading.Lock()  #: held by whoever looks
        self._lock = threading.Lock()
        self._seen: Mapping[str, _Seen] = {}
        self._added: defaultdict[tuple[str, int], Size] = defaultdict(Size)  #: since the look
        #: When it was looked, by the monotonic clock and by the database's; never yet.
        self._looked = (time.monotonic() - OLD_S - 1, datetime.now(UTC))
        self._asked_s = -math.inf
        self._took_s = 0.0
        self._since: datetime | None = None  #: the last end that was seen
        self._known: set[UUID] = set()  #: jobs that the next look would find again
        self._experience: defaultdict[str, Experience] = defaultdict(Experience)

    # ── what is asked ───────────────────────────────────────────────────────────────────────────

    def pace(self, model: str) -> Pace | None:
        """What is known of a model from jobs that ended."""
        with self._lock:
            return self._seen.get(model, UNSEEN).pace

    def promised(self, jobs: Sequence[NewJob]) -> list[NewJob]:
        """Jobs that are about to be written, each with what it is promised."""
        added = self._added_so_far()
        before = dict(added)
        forecasts = self._forecast(map(asked_of, jobs), added)
        with self._lock:
            for key, size in added.items():
                self._added[key] += size + before.get(key, NOTHING).times(-1.0)
        return [
            replace(
                job,
                quoted_ms=round(1e3 * told.estimate_s, 1),
                quoted_p90_ms=round(1e3 * told.eta.p90_s, 1),
            )
            if told.eta
            else job
            for job, told in zip(jobs, forecasts, strict=True)
        ]

    def expected(self, jobs: Iterable[Asked]) -> list[Forecast]:
        """What these jobs might expect if they were submitted now, in this order."""
        return self._forecast(jobs, self._added_so_far())

    def of(self, view: JobView) -> Forecast | None:
        """What a job may expect as its row was read; None if it does not wait."""
        if view.state is not JobState.QUEUED:
            return None
        self._asked_s = time.monotonic()
        job = Asked(
            view.model, view.priority, view.not_before, view.input_tokens, view.max_output_tokens
        )
        added, step = self._added_so_far(), self._layout.step(job.priority)
        lane = self._seen.get(job.model, UNSEEN).lanes.get(step, EMPTY)
        before = lane.before(view.created_at, view.id)
        if before is None:  # it is one of those that came since
            came = added[job.model, step]
            before = lane.total + came.times(1 - 1 / max(came.jobs, 1.0))
        return self._told(job, before, added, self.now())

    def _added_so_far(self) -> defaultdict[tuple[str, int], Size]:
        with self._lock:
            return defaultdict(Size, self._added)

    def now(self) -> datetime:
        """By the database's clock, without asking it."""
        looked_s, looked_at = self._looked
        return looked_at + timedelta(seconds=time.monotonic() - looked_s)

    def _age_s(self) -> float:
        """Of the last look."""
        return time.monotonic() - self._looked[0]

    def _forecast(
        self, jobs: Iterable[Asked], added: defaultdict[tuple[str, int], Size]
    ) -> list[Forecast]:
        """What jobs may expect that come one after the other; counts them among `added`."""
        now, self._asked_s = self.now(), time.monotonic()
        forecasts = []
        for job in jobs:
            step = self._layout.step(job.priority)
            lane = self._seen.get(job.model, UNSEEN).lanes.get(step, EMPTY)
            told = self._told(job, lane.total + added[job.model, step], added, now)
            forecasts.append(told)
            if told.due_at <= now:
                added[job.model, step] += raw_size(job)
        return forecasts

    def _told(
        self,
        job: Asked,
        before: Size,
        added: Mapping[tuple[str, int], Size],
        now: datetime,
    ) -> Forecast:
        """What a job may expect with so much before it of its own step."""
        due_at = max(now, job.not_before) if job.not_before else now
        if self._age_s() > max(OLD_S, 2 * LOOK_SHARE * self._took_s):
            return Forecast(due_at, None, None, Reason.NOT_LOOKED)
        seen, step = self._seen.get(job.model, UNSEEN), self._layout.step(job.priority)
        queued, urgent = before, NOTHING
        for other in range(self._layout.step(LIVE_PRIORITY), step):
            lane = seen.lanes.get(other, EMPTY)
            queued += lane.total + added.get((job.model, other), NOTHING)
            urgent += lane.a_second
        position = round(queued.jobs) + 1 if due_at <= now else None
        workers, start = seen.workers or seen.start.num_loading, seen.start
        load_s = None if seen.workers else start.load_s
        if not workers:
            return Forecast(due_at, position, None, Reason.NO_WORKER, load_s=load_s)
        if not seen.workers and start.left_s is None:
            return Forecast(due_at, position, None, Reason.LOADING)
        if (pace := seen.pace) is None:
            return Forecast(due_at, position, None, Reason.NO_HISTORY, load_s=load_s)
        size, ahead = (
            pace.likely(raw_size(job)),
            Ahead(*map(pace.likely, (queued, seen.running, urgent))),
        )
        places = workers * self._places(job.model)
        cold_s = 0.0 if seen.workers else start.left_s or 0.0
        due_in_s = (due_at - now).total_seconds()
        estimate_s = pace.estimate_s(size, ahead, workers, places, due_in_s, cold_s)
        eta = pace.eta(size, estimate_s)
        return Forecast(due_at, position, eta, None, estimate_s, pace, load_s)

    def _places(self, model: str) -> int:
        found = self._settings.models.get(model)
        return found.max_batch_size if found else 1

    # ── looking ─────────────────────────────────────────────────────────────────────────────────

    def keep(self, stop: threading.Event) -> None:
        """Look again and again, until `stop` is set."""
        while not stop.wait(self._pause_s()):
            self.look()

    def _pause_s(self) -> float:
        if self._since is None:
            return LOOK_S if self._took_s else 0.0
        is_asked = time.monotonic() - self._asked_s < ASKED_S
        return max(LOOK_S if is_asked else IDLE_S, LOOK_SHARE * self._took_s)

    def look_if_old(self) -> None:
        """For one who asks after a while in which nobody did; of many who come, one looks."""
        if self._age_s() > LOOK_S > self._took_s:
            self.look(LOOK_S)

    def look(self, age_s: float = 0.0) -> None:
        """Look at everything, if the last look is older than that. What cannot be looked at now is
        left as it was."""
        with self._looking:
            if self._age_s() < age_s:
                return
            began_s = time.monotonic()
            try:
                self._look(began_s)
            except GristmillError as error:
                log.debug("No outlook: %s", error, extra={"action": "outlook_failed"})
            self._took_s = time.monotonic() - began_s

    def _look(self, began_s: float) -> None:
        with self._lock:
            before = dict(self._added)
        now = self._database.now()
        with acting_for(EVERYBODY), self._database.autocommit() as connection:
            rungs = store.ladder(connection, self._layout.steps)
            inside = store.running(connection)
            started = loads.last(connection)
            up = store.workers(connection, now - WORKERS_SINCE, MOST_WORKERS)
            ended = store.ended_since(
                connection, (self._since or now - FIRST) - OVERLAP, MOST_ENDED
            )
            if self._since is None:
                for model in set(self._settings.models) - {job.model for job in ended}:
                    ended += store.ended_of(connection, model, MOST_OF_MODEL)
        learnt = self._learn(ended, is_cut=len(ended) >= MOST_ENDED, now=now)
        running = {each.model: _size_of(each) for each in inside}
        lanes = _lanes(rungs)
        models = {*lanes, *running, *self._experience}
        models.update(model for each in up for model in each.models)
        models.update(model for each in started for model in each.models)
        seen = {
            model: _Seen(
                lanes.get(model, {}),
                running.get(model, NOTHING),
                sum(each.is_up for each in up if model in each.models),
                self._pace(model, lanes.get(model, {}), up, now)
                if model in learnt or model in lanes
                else self._seen.get(model, UNSEEN).pace,
                _start(model, started, now),
            )
            for model in models
        }
        with self._lock:
            self._seen, self._looked = seen, (began_s, now)
            for key, size in before.items():  # those are in the ladder now, or gone from it
                self._added[key] += size.times(-1.0)

    def _learn(self, ended: Sequence[EndedJob], is_cut: bool, now: datetime) -> set[str]:
        """Take in what ended since the last look; the models that it is of."""
        new = [job for job in ended if job.job_id not in self._known]
        if is_cut and self._since is not None and len(new) == len(ended):
            for each in self._experience.values():
                each.forget_pace()
        by_model: defaultdict[str, list[Ended]] = defaultdict(list)
        for job in new:
            by_model[job.model].append(_ended(job))
        for model, jobs in by_model.items():
            self._experience[model].add(jobs)
        self._since = max((job.finished_at for job in ended), default=self._since or now - OVERLAP)
        kept_from = self._since - OVERLAP
        self._known = {job.job_id for job in ended if job.finished_at > kept_from}
        return set(by_model)

    def _pace(
        self, model: str, lanes: Mapping[int, _Lane], up: Sequence[Up], now: datetime
    ) -> Pace | None:
        if model not in self._experience:
            return None
        waiting = [each for lane in lanes.values() for each in lane.since_when()]
        workers = [
            (each.since.timestamp(), each.until.timestamp()) for each in up if model in each.models
        ]
        return self._experience[model].pace(waiting, workers, now.timestamp())

    # ── what is measured ────────────────────────────────────────────────────────────────────────

    def kept(self) -> dict[str, tuple[int, float]]:
        """By model, how many jobs ended that were promised an end, and the share that kept it."""
        return {
            model: (each.num_promised, each.share_kept)
            for model, each in list(self._experience.items())
            if each.share_kept is not None
        }


def _start(model: str, started: Sequence[Load], now: datetime) -> Start:
    own = [
        (each.began_at.timestamp(), each.ended_at.timestamp() if each.ended_at else None)
        for each in started
        if model in each.models
    ]
    return start_of(own, now.timestamp())


def asked_of(job: NewJob) -> Asked:
    return Asked(job.model, job.priority, job.not_before, job.input_tokens, job.max_output_tokens)


def raw_size(job: Asked) -> Size:
    """With all the tokens that it may generate."""
    return Size(1.0, job.input_tokens or 0, job.max_output_tokens or 0)


def _size_of(told: Any) -> Size:
    return Size(told.jobs, told.input_tokens, told.max_output_tokens)


def _lanes(rungs: Sequence[Rung]) -> dict[str, dict[int, _Lane]]:
    """By model and step."""
    lanes: defaultdict[str, dict[int, _Lane]] = defaultdict(dict)
    for (model, step), own in groupby(rungs, key=lambda rung: (rung.model, rung.step)):
        lanes[model][step] = _Lane.of(list(own))
    return lanes


def _ended(job: EndedJob) -> Ended:
    return Ended(
        job_id=job.job_id,
        due_s=job.due_at.timestamp(),
        started_s=job.started_at.timestamp(),
        ended_s=job.finished_at.timestamp(),
        size=Size(1.0, job.input_tokens, job.output_tokens),
        max_output_tokens=job.max_output_tokens,
        device_s=job.device_ns / 1e9,
        estimate_s=_seconds(job.quoted_ms),
        p90_s=_seconds(job.quoted_p90_ms),
    )


def _seconds(ms: float | None) -> float | None:
    """None also for what somebody wrote by hand."""
    return ms / 1e3 if ms is not None and math.isfinite(ms) and ms >= 0 else None
