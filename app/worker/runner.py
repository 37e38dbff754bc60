"""The runner takes jobs from their message to their row, and then to the ack.

It alone owns the batcher, the engine process, the claim and finish transactions and every word to
Celery. It goes round and never waits: `app.worker.thread` gives it a thread and wakes it. Other
threads only post commands.

While Postgres is away nothing is lost: what arrived waits, what finished waits, and the same
statement is tried again. The fence makes a second try harmless.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final
from uuid import UUID

from app.broker.lanes import Used, Whose
from app.errors import (
    GristmillError,
    LeaseLost,
    RequestError,
    Unavailable,
)
from app.worker.batcher import Batcher
from app.worker.commands import Command, Drain, Flush, Nameless, Revoked
from app.worker.dispatcher import Dispatcher
from app.worker.engine.host import EngineHost
from app.worker.engine.pipe import WorkerEnd
from app.worker.executor import Executor
from app.worker.ledger import Ledger
from app.worker.pool.arrivals import Refusal
from app.worker.pool.ticket import Ticket
from app.worker.registrar import Registrar
from app.worker.streams import TokenStreams
from app.worker.telling import tell_doomed, tell_ended
from app.worker.work import (
    CANCELLED,
    EXPIRED,
    TIMED_OUT,
    Batch,
    Doomed,
    Ending,
    Job,
    LeaseNews,
    Take,
)

log = logging.getLogger(__name__)

IDLE_WAIT_S: Final = 1.0
LEAST_WAIT_S: Final = 0.001
RETRY_S: Final = 0.5
GATHER_NS: Final = 250_000_000
"""While claimed jobs wait for room, ends are written together, no more often than this: what a
commit computes is taken from the engine, where both run on the same cores."""


class Runner:
    """Runs jobs, a turn at a time. All but `post`, `fail` and `facts` is for one thread alone."""

    def __init__(
        self,
        *,
        models: tuple[str, ...],
        registrar: Registrar,
        batcher: Batcher,
        ledger: Ledger,
        host: EngineHost,
        note_used: Callable[[Whose, Used], object] = lambda *_: None,
        streams: TokenStreams,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._note_used = note_used
        self.turned_ns = now_ns()  #: when the last turn began
        self.waits_for_database = False
        self._now_ns = now_ns
        self._registrar = registrar
        self._ledger = ledger
        self._dispatcher = Dispatcher(batcher)
        self._streams = streams
        self._executor = Executor(models, host, self._dispatcher, streams, now_ns)
        self._num_received = 0  #: messages
        self._commands: deque[Command] = deque()
        self._jobs: dict[UUID, Job] = {}
        self._over: list[Job] = []  #: ended, not yet committed
        self._doomed: list[Doomed] = []  #: not yet written
        self._leaving: list[Job] = []  #: claimed, not to be run here, and not yet given back
        self._taking: Take | None = None  #: one whose fate is unknown
        self._claiming: tuple[Batch, list[Job]] | None = None  #: a claim whose fate is unknown
        self._drain: Drain | None = None
        self._fatal: GristmillError | None = None
        self._paused_until_ns = 0
        self._committed_ns = 0  #: when ends were written last

    @property
    def ready(self) -> threading.Event:
        """The models are loaded, or never will be."""
        return self._executor.loaded

    def fail(self, error: GristmillError) -> None:
        """End the runner because of something that another thread found out."""
        self._fatal = error

    def post(self, command: Command) -> None:
        """For the next turn."""
        self._commands.append(command)

    def facts(self) -> dict[str, object]:
        """For `celery inspect stats`; only numbers, and names of ours."""
        return {
            **self._executor.facts(),
            "jobs": len(self._jobs),
            "waiting": len(self._dispatcher),
            "received": self._num_received,
            "held": bool(self._commands or self._jobs or self._doomed or self._registrar.has_work),
            "draining": self._drain is not None,
        }

    # ── the loop ─────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        self._executor.start()

    def turn(self) -> None:
        """Do all there is to do now. Raises what ends this worker."""
        self.turned_ns = self._now_ns()
        self._take_commands()
        if self._fatal is not None:
            raise self._fatal
        self._executor.hear(self._over)
        self._watch_limits()
        self._hand_over()  # what is claimed already: the device does not wait for Postgres
        self._with_database(self._take)
        self._with_database(self._release)
        self._with_database(self._register)
        self._with_database(self._admit)
        if self._ends_due_ns <= self.turned_ns:
            self._with_database(self._commit)

    def stop(self) -> None:
        """No turn follows: whatever is still claimed goes back, uncharged."""
        self._give_up()
        self.ready.set()

    @property
    def is_drained(self) -> bool:
        holds = self._jobs or self._doomed or self._registrar.has_work
        return self._drain is not None and not holds

    @property
    def connection(self) -> WorkerEnd | None:
        """To the engine process: what it says asks for a turn, and so does room for more."""
        return self._executor.connection

    def next_turn_s(self) -> float:
        """How long the next turn can wait if nobody says anything: until a batch closes, say."""
        now_ns = self._now_ns()
        rooms = {} if self._drain is not None else self._executor.rooms()
        closes_ns = self._dispatcher.next_close_ns(rooms)
        if self._paused_until_ns > now_ns:
            return (self._paused_until_ns - now_ns) / 1e9
        if self._doomed or self._leaving:
            return LEAST_WAIT_S
        due_ns = [self._ends_due_ns] if self._over else []
        if closes_ns is not None and closes_ns > self.turned_ns:
            due_ns.append(closes_ns)
        # What was due in this turn has no room until the engine says more.
        wait_s = (min(due_ns) - now_ns) / 1e9 if due_ns else IDLE_WAIT_S
        return min(IDLE_WAIT_S, max(LEAST_WAIT_S, wait_s))

    def _with_database(self, step: Callable[[], None]) -> None:
        """Run a step, or leave it for later while Postgres is away."""
        if self._now_ns() < self._paused_until_ns:
            return
        self.waits_for_database = True
        try:
            step()
        except (Unavailable, LeaseLost) as error:  # the next heartbeat may renew the lease
            self._paused_until_ns = self._now_ns() + int(RETRY_S * 1e9)
            log.warning("Waiting for Postgres: %s", error, extra={"action": "database_away"})
        finally:
            self.waits_for_database = False

    # ── what others say ──────────────────────────────────────────────────────────────────────

    def _take_commands(self) -> None:
        while self._commands:
            match self._commands.popleft():
                case Ticket() as ticket:
                    self._num_received += 1
                    self._registrar.add(ticket)
                case Refusal() as refusal:
                    self._num_received += 1
                    self._registrar.refuse(refusal)
                case Nameless():
                    self._num_received += 1
                case Revoked(job_id, kind):
                    self._registrar.revoke(job_id, kind)
                    self._cut_short(self._jobs.get(job_id), CANCELLED)
                case LeaseNews() as news:
                    self._hear_lease(news)
                case Flush():
                    self._forget_waiting()
                case Drain() as drain:
                    self._drain = drain
                    self._executor.start_no_more()
                    self._forget_waiting()

    def _hear_lease(self, news: LeaseNews) -> None:
        if news.held is not None and self._drain is None:
            self._registrar.compare()  # with each heartbeat
        for job_id in news.cancelled_jobs:
            self._cut_short(self._jobs.get(job_id), CANCELLED)
        for job in self._jobs.values():
            if (run := job.run) is None:
                continue
            if run.attempt_id in news.expired:
                self._cut_short(job, EXPIRED)
            elif run.attempt_id in news.cancelled or news.says_lost(run):
                # A lost attempt's commit will be refused, so there is no use in computing on.
                self._cut_short(job, CANCELLED)

    def _cut_short(self, job: Job | None, ending: Ending) -> None:
        if job is None or job.run is None:
            return
        if self._dispatcher.withdraw(job):  # it is claimed, and not in the engine
            job.run.ending = job.run.ending or ending
            self._over.append(job)
        else:
            self._executor.cut_short(job, ending)

    def _forget_waiting(self) -> None:
        """Let go of what has no claim: those rows stay queued, and their messages come back."""
        self._registrar.forget_waiting()
        claiming = self._claiming[1] if self._claiming else []
        for job in [job for job in self._jobs.values() if job.run is None and job not in claiming]:
            self._dispatcher.remove(job.id)
            del self._jobs[job.id]
            self._registrar.give_back(job.id)

    def _watch_limits(self) -> None:
        """Time limits, deadlines, and the end of the grace period."""
        now_ns = self._now_ns()
        for job in self._jobs.values():
            if job.run is None:
                continue
            if job.is_over_limit(now_ns):
                self._cut_short(job, TIMED_OUT)
            if job.deadline is not None and job.run.stamp(now_ns) > job.deadline:
                self._cut_short(job, EXPIRED)
        if self._drain is not None and (now_ns > self._drain.until_ns or self._waits_in_vain):
            self._give_up()

    @property
    def _waits_in_vain(self) -> bool:
        """Whether no job that this worker has claimed will end by itself: none is started now."""
        unknown = self._taking or self._claiming
        ends = self._executor.is_busy or self._over or self._leaving or unknown
        return bool(self._jobs) and not ends

    def _give_up(self) -> None:
        """What still runs goes back to the queue, uncharged; nothing more is run here.

        If Postgres is away now, the lease runs out instead, and rescue gives the jobs back.
        """
        self._executor.kill()
        try:
            self._commit()
            self._finish_take()
            self._ledger.release([job for job in self._jobs.values() if job.run is not None])
            self._register()
        except GristmillError as error:
            log.warning("Jobs are left to rescue: %s", error, extra={"action": "left_to_rescue"})
        self._jobs.clear()
        self._doomed.clear()
        self._leaving.clear()
        self._taking = None
        self._registrar.clear()

    # ── jobs in and out ──────────────────────────────────────────────────────────────────────

    def _take(self) -> None:
        """Claim what came, and fills a batch at once, and read it in the same statement."""
        self._finish_take()
        while self._drain is None and (take := self._foresee()):
            self._registrar.keep(take)
            self._taking = take
            self._finish_take()
            self._hand_over()

    def _foresee(self) -> Take | None:
        if not (came := self._registrar.takable(self._jobs.keys())):
            return None
        return self._dispatcher.foresee(came, self._executor.rooms(), self._now_ns())

    def _finish_take(self) -> None:
        """What was taken, also by a call before whose answer was lost, is claimed by this worker;
        the rest is registered."""
        if (take := self._taking) is None:
            return
        taken, refused = self._ledger.take(take)
        self._taking = None
        sorted_ = self._registrar.sort_taken(take, taken, refused)
        self._doomed += [each for each in sorted_ if isinstance(each, Doomed)]
        jobs = [each for each in sorted_ if isinstance(each, Job)]
        self._ledger.begin(take.batch, jobs, taken)
        self._jobs |= {job.id: job for job in jobs}
        self._dispatcher.add_claimed(jobs)
        self._end_misfits()

    def _release(self) -> None:
        """While this worker drains: what is claimed and does not run goes back, uncharged."""
        if self._drain is None:
            return
        claimed = [job for job in self._jobs.values() if job.run is not None]
        for job in filter(self._dispatcher.withdraw, claimed):
            # If it is known to be what an engine died of, it ends.
            (self._over if job.claimed_run.ending else self._leaving).append(job)
        self._ledger.release(self._leaving)
        for job in self._leaving:
            job.ticket.dropped()
            self._streams.leave(job)
            del self._jobs[job.id]
        self._leaving = []

    def _register(self) -> None:
        self._end_doomed()
        if self._taking is not None or not self._registrar.has_work:
            return
        for job in self._registrar.register(self._jobs):
            if isinstance(job, Doomed):
                self._doomed.append(job)
                continue
            self._jobs[job.id] = job
            self._dispatcher.add(job)
        self._end_doomed()
        if self._drain is not None:
            self._forget_waiting()

    def _end_doomed(self) -> None:
        """Write the ends of jobs that cannot run: they never enter a batch or the engine."""
        while self._doomed:
            is_committed = self._ledger.fail(self._doomed[0])
            tell_doomed(self._doomed.pop(0), is_committed=is_committed)

    @property
    def _ends_due_ns(self) -> int:
        """When what has ended is to be written: at once, unless others follow soon anyway."""
        is_full = self._executor.is_busy and self._dispatcher.has_claimed
        return self._committed_ns + GATHER_NS if is_full and self._drain is None else 0

    def _commit(self) -> None:
        """Write what ended, in one transaction, and only then tell Celery."""
        if not self._over:
            return
        self._committed_ns = self._now_ns()
        committed = self._ledger.commit(self._over)
        for job in self._over:
            self._note_used(  # first: it goes along with the ack
                (job.model, job.priority, job.tenant), Used(1, 1, job.claimed_run.spent_ns)
            )
            tell_ended(job, is_committed=job.claimed_run.attempt_id in committed)
            self._streams.leave(job)
            self._jobs.pop(job.id, None)
        self._over = []

    def _admit(self) -> None:
        """Claim what is due, and hand it to the engine."""
        if self._must_write_first:
            self._commit()
        if self._claiming is not None:
            self._claim(*self._claiming)
        self._end_misfits()
        self._hand_over()
        if self._drain is not None or not self._executor.rooms():
            return
        while not self._must_write_first and (
            closed := self._dispatcher.close(self._executor.rooms(), self._now_ns())
        ):
            self._claim(closed.batch, closed.jobs)
            self._hand_over()

    @property
    def _must_write_first(self) -> bool:
        """A worker that dies of a suspect must not take with it what has ended: that would be lost
        as if it had run alone once more, and be blamed for it."""
        return bool(self._over) and self._dispatcher.has_suspects

    def _end_misfits(self) -> None:
        """End jobs that have more sequences than their engine takes when it is empty."""
        rooms = self._executor.rooms() if self._drain is None else {}
        for job, most in self._dispatcher.misfits(rooms) if rooms else ():
            self._end_misfit(job, most)

    def _end_misfit(self, job: Job, most: int) -> None:
        error = RequestError(
            f"The request asks for {job.num_sequences} sequences (prompts times n); this worker "
            f"takes at most {most}."
        )
        if job.run is not None:
            job.run.ending = job.run.ending or Ending.failed(error)
            self._over.append(job)
        else:
            del self._jobs[job.id]
            self._doomed.append(Doomed(job.ticket, job.model, Ending.failed(error)))

    def _claim(self, batch: Batch, jobs: list[Job]) -> None:
        """Claim the members; those that were granted go in when there is room.

        The others were cancelled, expired or taken since they were registered: their messages have
        nothing more to do.
        """
        self._claiming = (batch, jobs)
        granted = self._ledger.claim(batch, jobs)
        self._claiming = None
        for job in jobs:
            if job.run is None:
                self._note_used((job.model, job.priority, job.tenant), Used(ended=1))
                del self._jobs[job.id]
                self._registrar.give_back(job.id)  # if it is queued all the same
                job.ticket.dropped()
        self._dispatcher.add_claimed(granted)

    def _hand_over(self) -> None:
        """Run what is claimed and fits now; suspects alone, before the rest."""
        if self._drain is not None:
            return
        while not self._must_write_first and (rooms := self._executor.rooms()):
            if not (jobs := self._dispatcher.next_claimed(rooms)):
                return
            self._run(jobs)

    def _run(self, jobs: list[Job]) -> None:
        """Run claimed jobs; those whose end is known already are over without it."""
        going = [job for job in jobs if job.claimed_run.ending is None]
        self._over += [job for job in jobs if job.claimed_run.ending is not None]
        if not going:
            return
        if self._dispatcher.runs_apart:
            log.info("Runs %d suspects apart.", len(going), extra={"action": "runs_apart"})
        self._executor.run(going)
