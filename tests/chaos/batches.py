"""A client of batches: uploads a file of lines, submits it, follows it to its end and reads it.

What it does is in the history: a `batch` event for each call, and for each line a submission of the
way `batch`, which is `ok` when its answer was read. A call without a clear answer is made again: an
upload is another file then, a submission the same batch, by its key.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Final

import httpx

from app.batches import FINAL
from tests.chaos.history import History
from tests.chaos.spec import Spec, by_chance
from tests.chaos.world import NotInTime, World

URL: Final = "/v1/completions"
LINES: Final = 40
LOOK_S: Final = 0.25
PAUSE_S: Final = 0.3
HOLD_S: Final = 90.0


class Batches:
    """One batch after the other while load is on; a short slice has one. A thread of its own."""

    def __init__(
        self, world: World, history: History, rng: random.Random, canary: str, *, again: bool
    ) -> None:
        self._world = world
        self._history = history
        self._rng = rng
        self._canary = canary
        self._again = again
        self._is_enough = threading.Event()  #: no other one is begun
        self._is_left = threading.Event()
        self._turn = threading.Lock()  #: held while one runs, and by whoever wants none
        self._thread = threading.Thread(target=self._run, name="batches")
        self._client = httpx.Client(base_url=world.api_url, timeout=10, trust_env=False)

    def start(self) -> None:
        self._thread.start()

    def enough(self) -> None:
        self._is_enough.set()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        """What has not ended by now is left; the checker names it."""
        self._is_enough.set()
        self._is_left.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._client.close()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no batch runs."""
        if not self._turn.acquire(timeout=HOLD_S):
            raise NotInTime(f"A batch did not end within {HOLD_S:g} s.")
        try:
            yield
        finally:
            self._turn.release()

    def _run(self) -> None:
        while not self._is_enough.is_set():
            with self._turn:
                self._batch(f"b{self._rng.getrandbits(64):016x}")
            if not self._again:
                return
            self._is_enough.wait(PAUSE_S)

    def _batch(self, nonce: str) -> None:
        specs = {spec.nonce: spec for spec in (self._line() for _ in range(LINES))}
        text = "\n".join(json.dumps(_line_of(spec)) for spec in specs.values())
        form = {"files": {"file": ("in.jsonl", text.encode())}, "data": {"purpose": "batch"}}
        file = self._until_done(nonce, "POST", "/v1/files", **form)
        if file is None:
            return
        numbers = {
            spec.nonce: self._history.invoke(
                "submit", spec.nonce, way="batch", batch=nonce, prompt=spec.prompt,
                expect=spec.expect,
            )
            for spec in specs.values()
        }  # fmt: skip
        asked = {
            "input_file_id": file["id"],
            "endpoint": URL,
            "completion_window": "24h",
            "idempotency_key": nonce,
            "webhook_url": self._world.hook_url,
        }
        batch = self._until_done(nonce, "POST", "/v1/batches", json=asked)
        while batch is not None and batch["status"] not in FINAL:
            self._is_left.wait(LOOK_S)
            batch = self._until_done(nonce, "GET", f"/v1/batches/{batch['id']}")
        if batch is not None and batch["output_file_id"]:
            self._read(nonce, batch["output_file_id"], numbers)

    def _line(self) -> Spec:
        last_line = f"sleep {self._rng.randrange(20, 100)}" if self._rng.random() < 0.15 else ""
        return by_chance(self._rng, self._canary, last_line)

    def _read(self, nonce: str, file_id: str, numbers: dict[str, int]) -> None:
        answer = self._until_done(nonce, "GET", f"/v1/files/{file_id}/content")
        for line in answer or ():
            name, job_id = line["custom_id"], line["id"].removeprefix("batch_req_")
            job_id = f"{job_id[:8]}-{job_id[8:12]}-{job_id[12:16]}-{job_id[16:20]}-{job_id[20:]}"
            given: dict[str, Any] = {"job_id": job_id, "way": "batch", "batch": nonce}
            self._history.end(numbers[name], "ok", "submit", name, **given)
            text = line["response"]["body"]["choices"][0]["text"]
            number = self._history.invoke("poll", name, job_id=job_id)
            told = {"state": "completed", "text": text}
            self._history.end(number, "ok", "poll", name, job_id=job_id, **told)

    def _until_done(self, nonce: str, method: str, path: str, **given: Any) -> Any:
        """The answer of a call, which is made until it has one; None if the batch is left."""
        while not self._is_left.is_set():
            number = self._history.invoke("batch", nonce, detail=f"{method} {path}")
            began = time.monotonic()
            try:
                answer = self._client.request(method, path, **given)
            except httpx.TransportError as error:
                self._history.end(number, "unknown", "batch", nonce, detail=type(error).__name__)
            else:
                if answer.is_success:
                    return self._done(number, nonce, answer)
                retry_after = answer.headers.get("Retry-After")
                told = {"status": answer.status_code, "retry_after": retry_after}
                self._history.end(number, "fail", "batch", nonce, **told)
                if answer.status_code < HTTPStatus.TOO_MANY_REQUESTS:
                    return None  # the checker will miss it
            self._is_left.wait(max(0.0, PAUSE_S - (time.monotonic() - began)))
        return None

    def _done(self, number: int, nonce: str, answer: httpx.Response) -> Any:
        told: dict[str, Any] = {"status": answer.status_code}
        if answer.headers["content-type"] != "application/json":
            self._history.end(number, "ok", "batch", nonce, **told)
            return [json.loads(line) for line in answer.text.splitlines()]
        found = answer.json()
        if counts := found.get("request_counts"):
            told |= {"state": found["status"], "job_id": found["id"]}
            told["counts"] = (counts["total"], counts["completed"], counts["failed"])
        self._history.end(number, "ok", "batch", nonce, **told)
        return found


def _line_of(spec: Spec) -> dict[str, Any]:
    return {"custom_id": spec.nonce, "method": "POST", "url": URL, "body": spec.body}
