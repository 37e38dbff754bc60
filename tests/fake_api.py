"""The API in memory, as a transport of httpx: what a client or a command meets, without servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import httpx

Answer = httpx.Response | Exception

QUOTE: Final[dict[str, Any]] = {
    "object": "quote",
    "model": "stub",
    "tokens": {"input_tokens": 5, "max_output_tokens": 16},
    "position": 3,
    "start": {"p50": "2027-01-31T12:00:00Z", "p90": "2027-01-31T12:00:01Z"},
    "finish": {"p50": "2027-01-31T12:00:02Z", "p90": "2027-01-31T12:00:03Z"},
    "reason": None,
    "load_s": None,
    "deadline": None,
    "deadline_outlook": None,
    "cost": {
        "amount": {"low": "0.000000001", "high": "0.000000002"},
        "charge": None,
        "currency": "USD",
        "price_id": "cpu",
    },
    "known_as": None,
}


class FakeApi:
    """Keeps jobs, and completes each when it is first waited for with what `answer` makes of it.

    `troubles` come first, one a request.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}  #: by id
        self.submitted: list[dict[str, Any]] = []  #: what made a job, in order
        self.requests: list[httpx.Request] = []
        self.troubles: list[Answer] = []
        self.before: Callable[[httpx.Request], None] = lambda _: None
        self.tells_all = True  #: in the events of a job
        self._by_key: dict[str, str] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.before(request)
        if self.troubles:
            trouble = self.troubles.pop(0)
            if isinstance(trouble, Exception):
                raise trouble
            return trouble
        if request.url.path.endswith("/events"):
            return self._events(request.url.path.split("/")[-2])
        status, value = self._answer(request)
        return httpx.Response(status, json=value) if value is not None else httpx.Response(status)

    def add(self, job_id: str, state: str = "queued", **more: Any) -> dict[str, Any]:
        """A job that is there."""
        times = {"created_at": "2027-01-31T12:00:00Z"}
        base = {"id": job_id, "state": state, "model": "stub", "response": None, "error": None}
        self.jobs[job_id] = base | times | {"metadata": {}} | more
        return self.jobs[job_id]

    def _answer(self, request: httpx.Request) -> tuple[int, Any]:
        path, is_held = request.url.path, "wait" in request.url.params
        if "dry_run" in request.url.params:
            return 200, self._quoted(json.loads(request.content))
        match request.method, path.removeprefix("/v1/jobs"):
            case "POST", "/bulk":
                items = [self._submit(each) for each in json.loads(request.content)["jobs"]]
                return 202, {"items": items}
            case "POST", "/status":
                return 200, self._status(json.loads(request.content), is_held)
            case "POST", "/cancel":
                return 200, self._cancel(json.loads(request.content))
            case "GET", "":
                wanted = request.url.params.get("state")
                found = [each for each in self.jobs.values() if wanted in (None, each["state"])]
                return 200, {"data": found, "has_more": False, "last_id": None}
            case "GET", _ if path.endswith("/timeline"):
                found = self.jobs.get(path.split("/")[-2])
                return (200, found["timeline"]) if found else NOT_FOUND
            case "GET", _:
                return self._told(path.rpartition("/")[2], is_held)
            case "DELETE", _:
                return (204, None) if self.jobs.pop(path.rpartition("/")[2], None) else NOT_FOUND
            case "POST", _:
                old = path.split("/")[-2]
                if self.jobs[old].get("is_removed"):
                    return 410, {"code": "request_removed", "detail": "It is not there."}
                return 202, self.add(f"new-{old}", replay_of=old)
        raise AssertionError(path)

    def _events(self, job_id: str) -> httpx.Response:
        """Of a job that is begun twice; its first answer has two tokens."""
        self._told(job_id, is_held=True)
        job = self.jobs[job_id]
        text = job["response"]["choices"][0]["text"]
        told: list[tuple[str, dict[str, Any]]] = [("queued", {"position": 1}), ("started", {})]
        told += [("tokens", {"index": 0, "text": "void"}), ("restarted", {})]
        told += [("tokens", {"index": 0, "text": part}) for part in (text[:2], text[2:])]
        told.append(("end", {"complete": self.tells_all, "job": job}))
        lines = [f"event: {event}\ndata: {json.dumps(data)}\n\n" for event, data in told]
        return httpx.Response(200, content="".join(lines))

    def _quoted(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The same quote for every job but those of one model."""
        if "jobs" not in asked:
            return QUOTE
        items = [
            {"status": 404, "error": {"detail": "No model 'gpt-9'."}}
            if job["body"].get("model") == "gpt-9"
            else {"status": 202, "quote": QUOTE}
            for job in asked["jobs"]
        ]
        return {"items": items, "finish": QUOTE["finish"], "costs": [QUOTE["cost"]]}

    def _submit(self, submission: dict[str, Any]) -> dict[str, Any]:
        key, body = json.dumps(submission["idempotency_key"]), submission["body"]
        if body.get("model") == "gpt-9":
            error = {
                "code": "model_not_found",
                "detail": "No model 'gpt-9'.",
                "param": "body.model",
            }
            return {"status": 404, "error": error}
        if key not in self._by_key:
            self.submitted.append(submission)
            self._by_key[key] = f"job-{len(self.submitted)}"
            self.add(self._by_key[key], body=body, metadata=submission.get("metadata", {}))
        return {"status": 202, "id": self._by_key[key]}

    def _status(self, asked: dict[str, Any], is_held: bool) -> dict[str, Any]:
        items = []
        for job_id in asked["ids"]:
            status, told = self._told(job_id, is_held)
            if status == 404:
                items.append({"status": 404, "id": job_id, "error": told})
            else:
                is_open = told["state"] in ("queued", "running")
                is_shown = asked["view"] != "state" and not (asked["view"] == "ended" and is_open)
                shown = {"job": told} if is_shown else {}
                items.append({"status": 200, "id": job_id, "state": told["state"]} | shown)
        return {"items": items}

    def _told(self, job_id: str, is_held: bool) -> tuple[int, dict[str, Any]]:
        if job_id not in self.jobs:
            return NOT_FOUND
        job = self.jobs[job_id]
        if is_held and job["state"] == "queued":
            prompt = job.get("body", {}).get("prompt", "?")
            job |= {"state": "completed", "response": {"choices": [{"text": f"{prompt}!"}]}}
        return 200, {name: value for name, value in job.items() if name != "body"}

    def _cancel(self, asked: dict[str, Any]) -> dict[str, Any]:
        ids = asked.get("ids") or [
            job_id for job_id, job in self.jobs.items() if job["state"] in ("queued", "running")
        ]
        items = []
        for job_id in ids:
            if job_id not in self.jobs:
                items.append({"status": 404, "id": job_id, "error": NOT_FOUND[1]})
            elif self.jobs[job_id]["state"] in ("queued", "cancelled"):
                self.jobs[job_id]["state"] = "cancelled"
                items.append({"status": 200, "id": job_id, "state": "cancelled"})
            else:
                items.append({"status": 202, "id": job_id, "state": "running"})
        return {"items": items, "has_more": False}


NOT_FOUND = 404, {"code": "job_not_found", "detail": "No such job."}
