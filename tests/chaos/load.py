"""Clients that go on whatever happens: they submit, poll, cancel, and note it in the history.

Jobs come in three ways: one by one and in bulk over HTTP, and as bare Celery messages put straight
into Redis. What is decided by chance is decided by a seed. A submission without a clear answer is
sent again under its idempotency key until it is accepted; a bare message that nobody received is
sent again under its id, by `send_unreceived`.
"""

from __future__ import annotations

import contextlib
import math
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any, Final
from uuid import UUID, uuid4

import httpx
import psycopg
import redis

from app.broker.message import raw_message
from app.broker.queues import Layout, queue_name
from app.jobs import Kind
from gristmill_client.exchange import LIMITS
from tests.chaos.batches import Batches
from tests.chaos.history import History
from tests.chaos.spec import Spec, by_chance
from tests.chaos.world import MODELS, NotInTime, World, eventually

SENDERS: Final = 3
BULK: Final = 20
MOST_OPEN: Final = 200
"""With more jobs that have not ended nothing is added: a long queue says nothing of recovery."""
TIMEOUT_S: Final = 6.0
MOST_LATE_S: Final = 1.0
"""What could not be submitted for longer than that is not made up for in a rush afterwards."""
PAUSE_S: Final = 0.3
"""Before a submission is tried again; Retry-After is heeded up to three times that."""
ASK_S: Final = 0.5
"""Between two questions whether the API is ready."""
LONG_S: Final = 3600.0
"""A deadline that is always met."""
_NUM_OPEN: Final = "SELECT count(*) FROM jobs WHERE finished_at IS NULL"


class Load:
    """The clients of one fault: at least so many jobs, and more for as long as the fault lasts.

    Use as a context manager: leaving waits for all to be accepted.
    """

    def __init__(
        self,
        world: World,
        history: History,
        rng: random.Random,
        *,
        jobs: int,
        rate: float,
        canary: str,
        ways: Sequence[str] = ("http", "bulk", "message"),
        is_full: bool = False,
    ) -> None:
        """`rate` is in jobs per second. `canary` is a text in every prompt."""
        of_batches = random.Random(rng.random())
        self.batches = Batches(world, history, of_batches, canary, again=is_full)
        self.canary = canary
        self.accepted: dict[str, str] = {}  #: job id by nonce
        self._world = world
        self._history = history
        self._rng = rng  # of the fault's thread
        self._rng_of_plan = random.Random(rng.random())  # under the lock
        self._rate = rate
        self._ways = ways
        self._jobs = jobs
        self._planned = 0
        self._due_at = 0.0  #: when the next is to be submitted, by the monotonic clock
        self._is_enough = False  #: the fault is over
        self._is_held = False  #: nothing is added by chance now
        self._planning = threading.Lock()
        self._num_open = 0
        self._specs: dict[str, Spec] = {}
        self._unreceived: dict[str, UUID] = {}  #: bare messages, by nonce
        self._cancels: queue.SimpleQueue[tuple[float, Spec]] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._redis = world.redis_client()
        self._clients = threading.local()
        self._all_clients: list[httpx.Client] = []
        self._threads = [threading.Thread(target=self._send_all) for _ in range(SENDERS)]
        self._poller = threading.Thread(target=self._poll_some, args=(rng.randrange(1 << 30),))
        self._asker = threading.Thread(target=self._ask_readiness)

    def __enter__(self) -> Load:
        for thread in (*self._threads, self._poller, self._asker):
            thread.start()
        self.batches.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self._ended.set()
        self._is_enough = True
        self.batches.enough()
        for thread in self._threads:
            thread.join()
        self._ended.set()
        self._poller.join()
        self._asker.join()
        for client in self._all_clients:
            client.close()

    def close(self) -> None:
        self.batches.close()
        for client in self._all_clients:
            client.close()

    # ── for faults ───────────────────────────────────────────────────────────────────────────

    def wait_accepted(self, number: int, timeout_s: float = 60.0) -> None:
        """Return when so many jobs of this load have been accepted."""
        deadline = time.monotonic() + timeout_s
        while len(self.accepted) < number:
            if time.monotonic() > deadline:
                raise NotInTime(f"{len(self.accepted)} of {number} jobs accepted.")
            time.sleep(0.01)

    def make(self, last_line: str = "", **given: Any) -> Spec:
        """A job whose prompt ends with a line that the stub engine obeys."""
        return by_chance(self._rng, self.canary, last_line, **given)

    def submit(self, *specs: Spec, way: str = "http", give_up_s: float = math.inf) -> list[str]:
        """Submit a fault's own jobs now, until they are accepted; returns their ids.

        After `give_up_s` it is left; the ids are those of the jobs accepted by then.
        """
        for spec in specs:
            self._specs[spec.nonce] = spec
        groups = [list(specs)] if way == "bulk" else [[spec] for spec in specs]
        for group in groups:
            self._send(way, group, give_up_s)
        return [job_id for spec in specs if (job_id := self.accepted.get(spec.nonce))]

    def send_unreceived(self, received: set[str]) -> int:
        """Send bare messages again whose job is not in Postgres yet; how many there were."""
        missing = [n for n, job_id in self._unreceived.items() if str(job_id) not in received]
        for nonce in missing:
            self._send_message(self._specs[nonce])
        return len(missing)

    def note_message(self, task_id: str, expect: tuple[str, ...], prompt: str | None = "") -> None:
        """A fault has put a message of its own into Redis; the job of its id ends like this. With
        the prompt None its answer is not looked at."""
        nonce = f"n{task_id}"
        given: dict[str, Any] = {"way": "message", "job_id": task_id}
        number = self._history.invoke("submit", nonce, prompt=prompt, expect=expect, **given)
        self.accepted[nonce] = task_id
        self._history.end(number, "ok", "submit", nonce, **given)

    def is_own(self, job_id: str, key: str | None) -> bool:
        """Whether a job was submitted by this load."""
        sent = {*list(self.accepted.values()), *map(str, list(self._unreceived.values()))}
        of_batch = "SELECT EXISTS (SELECT FROM job_batch_lines WHERE job_id = %s)"
        return job_id in sent or key in self._specs or self._world.value(of_batch, job_id)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, only the fault's own jobs are submitted; all others have ended."""
        self._is_held = True
        try:
            with self.batches.held():
                empty = "an empty queue"
                eventually(lambda: self._world.value(_NUM_OPEN) == 0, TIMEOUT_S * 5, empty)
                yield
        finally:
            self._is_held = False

    def poll(self, nonce: str) -> None:
        """Ask for a job once."""
        job_id = self.accepted[nonce]
        number = self._history.invoke("poll", nonce, job_id=job_id)
        try:
            answer = self._client.get(f"/v1/jobs/{job_id}")
        except httpx.TransportError as error:
            self._history.end(number, "unknown", "poll", nonce, detail=type(error).__name__)
            return
        given: dict[str, Any] = {"job_id": job_id, "status": answer.status_code}
        if answer.status_code == HTTPStatus.OK:
            job = answer.json()
            response = job.get("response") or {}
            text = response["choices"][0].get("text") if response.get("choices") else None
            self._history.end(number, "ok", "poll", nonce, state=job["state"], text=text, **given)
        else:
            given["retry_after"] = answer.headers.get("Retry-After")
            self._history.end(number, "fail", "poll", nonce, **given)

    # ── the plan ─────────────────────────────────────────────────────────────────────────────

    def _next_group(self) -> tuple[float, str, list[Spec]] | None:
        """What to submit next, when it is due and how; None when there is enough."""
        with self._planning:
            if self._planned >= self._jobs and self._is_enough:
                return None
            way = self._rng_of_plan.choice(self._ways)
            group = [self._chance_spec(way) for _ in range(BULK if way == "bulk" else 1)]
            due_at = max(self._due_at, time.monotonic() - MOST_LATE_S)
            self._due_at = due_at + len(group) / self._rate
            self._planned += len(group)
            self._specs |= {spec.nonce: spec for spec in group}
        return due_at, way, group

    def _chance_spec(self, way: str) -> Spec:
        rng = self._rng_of_plan
        chance = rng.random
        given: dict[str, Any] = {"model": rng.choice(MODELS)}
        if chance() < 0.1:
            given["priority"] = rng.randrange(10)
        last_line = f"sleep {rng.randrange(20, 200)}" if chance() < 0.15 else ""
        if way != "message" and chance() < 0.02:
            given |= {"deadline_s": LONG_S}
        elif way != "message" and chance() < 0.01:
            given |= {"deadline_s": 1.0 + chance(), "expect": ("completed", "expired")}
        elif way != "message" and chance() < 0.02:
            given |= {"cancel_after_s": chance() / 2, "expect": ("completed", "cancelled")}
        if way != "message" and chance() < 0.1:
            given["webhook_url"] = self._world.hook_url
        return by_chance(rng, self.canary, last_line, **given)

    # ── sending ──────────────────────────────────────────────────────────────────────────────

    @property
    def _client(self) -> httpx.Client:
        """One for each thread; it lives as long as the thread."""
        if not hasattr(self._clients, "http"):
            self._clients.http = httpx.Client(
                base_url=self._world.api_url,
                timeout=TIMEOUT_S,
                trust_env=False,
                limits=LIMITS,
            )
            self._all_clients.append(self._clients.http)
        return self._clients.http  # type: ignore[no-any-return]

    def _send_all(self) -> None:
        while (item := self._next_group()) is not None and not self._ended.is_set():
            due_at, way, group = item
            self._ended.wait(max(0.0, due_at - time.monotonic()))
            while self._is_crowded and not self._ended.wait(0.05):
                pass
            self._send(way, group)

    @property
    def _is_crowded(self) -> bool:
        return self._is_held or self._num_open > MOST_OPEN

    def _send(self, way: str, group: list[Spec], give_up_s: float = math.inf) -> None:
        """Submit until all of a group are accepted, or refused for good."""
        until = time.monotonic() + give_up_s
        while group and not self._ended.is_set() and time.monotonic() < until:
            if way == "message":
                done = self._send_message(group[0])
            else:
                done, pause_s = self._post(way, group)
                if not done:
                    self._ended.wait(pause_s)
                    continue
            if done:
                for spec in group:
                    if spec.cancel_after_s is not None:
                        self._cancels.put((time.monotonic() + spec.cancel_after_s, spec))
                return
            self._ended.wait(PAUSE_S)

    def _send_message(self, spec: Spec) -> bool:
        job_id = self._unreceived.setdefault(spec.nonce, uuid4())
        given = {"way": "message", "prompt": spec.prompt, "expect": spec.expect}
        number = self._history.invoke("submit", spec.nonce, job_id=str(job_id), **given)
        name = queue_name(spec.model)
        message = raw_message(job_id, Kind.GENERATE, spec.body, queue=name, priority=spec.priority)
        try:
            self._redis.lpush(Layout().key(name, spec.priority), message)
        except redis.RedisError as error:
            detail = type(error).__name__
            self._history.end(number, "unknown", "submit", spec.nonce, detail=detail, way="message")
            return False
        self.accepted[spec.nonce] = str(job_id)
        self._history.end(number, "ok", "submit", spec.nonce, job_id=str(job_id), way="message")
        return True

    def _post(self, way: str, group: list[Spec]) -> tuple[bool, float]:
        """Whether the group is settled; if not, how long to wait before it is tried again."""
        numbers = [
            self._history.invoke(
                "submit",
                spec.nonce,
                way=way,
                prompt=spec.prompt,
                expect=spec.expect,
                is_hooked=spec.webhook_url is not None,
            )
            for spec in group
        ]
        submissions = [spec.submission() for spec in group]
        try:
            if way == "bulk":
                answer = self._client.post("/v1/jobs/bulk", json={"jobs": submissions})
            else:
                answer = self._client.post("/v1/jobs", json=submissions[0])
        except httpx.TransportError as error:
            self._end_all(numbers, group, "unknown", way=way, detail=type(error).__name__)
            return False, PAUSE_S
        given: dict[str, Any] = {"way": way, "status": answer.status_code}
        if answer.is_success:
            ids = _ids(answer, way)
            for number, spec, job_id in zip(numbers, group, ids, strict=True):
                self.accepted[spec.nonce] = job_id
                self._history.end(number, "ok", "submit", spec.nonce, job_id=job_id, **given)
            return True, 0.0
        retry_after = answer.headers.get("Retry-After")
        # A 429 was given before anything was written; behind a 5xx there may be a commit.
        is_final = 400 <= answer.status_code < 500
        self._end_all(
            numbers, group, "fail" if is_final else "unknown", retry_after=retry_after, **given
        )
        if is_final and answer.status_code != HTTPStatus.TOO_MANY_REQUESTS:
            return True, 0.0
        return False, min(float(retry_after or 0) or PAUSE_S, 3 * PAUSE_S)

    def _end_all(self, numbers: list[int], group: list[Spec], phase: str, **given: Any) -> None:
        for number, spec in zip(numbers, group, strict=True):
            self._history.end(number, phase, "submit", spec.nonce, **given)

    # ── polling and cancelling ───────────────────────────────────────────────────────────────

    def _poll_some(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._ended.wait(0.05):
            with contextlib.suppress(psycopg.OperationalError):  # unknown is as before
                self._num_open = self._world.value(_NUM_OPEN)
            for spec in self._due_cancels():
                self._cancel(spec)
            if known := list(self.accepted):
                self.poll(rng.choice(known))
        for spec in self._due_cancels(everything=True):
            self._cancel(spec)

    def _ask_readiness(self) -> None:
        while not self._ended.wait(ASK_S):
            number = self._history.invoke("ready", "")
            try:
                answer = self._client.get("/readyz")
            except httpx.TransportError as error:
                detail = type(error).__name__
                self._history.end(number, "unknown", "ready", "", detail=detail)
                continue
            phase = "ok" if answer.is_success else "fail"
            self._history.end(number, phase, "ready", "", status=answer.status_code)

    def _due_cancels(self, *, everything: bool = False) -> Iterator[Spec]:
        for _ in range(self._cancels.qsize()):
            due, spec = self._cancels.get()
            if everything or time.monotonic() >= due:
                yield spec
            else:
                self._cancels.put((due, spec))

    def _cancel(self, spec: Spec) -> None:
        job_id = self.accepted[spec.nonce]
        number = self._history.invoke("cancel", spec.nonce, job_id=job_id)
        try:
            answer = self._client.post(f"/v1/jobs/{job_id}/cancel")
        except httpx.TransportError as error:
            detail = type(error).__name__
            self._history.end(number, "unknown", "cancel", spec.nonce, detail=detail)
            return
        phase = "ok" if answer.is_success else "fail"
        self._history.end(number, phase, "cancel", spec.nonce, status=answer.status_code)


def _ids(answer: httpx.Response, way: str) -> list[str]:
    """Job ids of an accepted submission; an item of a bulk that was refused has an empty one."""
    if way == "bulk":
        return [item.get("id", "") for item in answer.json()["items"]]
    return [answer.json()["id"]]
