"""Two tenants send words that nobody else knows through every door of a whole system. Then all of
it is looked through: each word is where it is meant to be, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import httpx
import pytest
from celery import Celery
from fastapi.routing import APIRoute, iter_route_contexts

from app.api.app import create_app
from app.config.settings import Settings
from app.keys import Scope
from app.store.notices import DONE
from tests.apis import made_key
from tests.canaries import (
    Cage,
    canary,
    look_in_files,
    look_in_postgres,
    look_in_processes,
    look_in_redis,
    overheard,
)
from tests.conftest import STUB_MODELS
from tests.receivers import Receiver, receiving
from tests.signals import HEEDING_SIGNALS
from tests.systems import Up
from tests.waiting import eventually

LOUD: Final = ("env", "GRISTMILL_LOG_LEVEL=DEBUG", *HEEDING_SIGNALS)
SETTINGS: Final = """
[broker]
trusted_tenants = ["mill", "bakery"]
[rescue]
sweep_ms = 200
[webhooks]
allow_networks = ["127.0.0.0/8"]
poll_ms = 50
"""
TENANTS: Final = ("mill", "bakery")
STUB: Final = {"model": "stub", "max_tokens": 100}

AOF: Final = "file redis/appendonly.aof"
"""Where Redis keeps what was in a message, until it rewrites that."""

PLACES: Final[dict[str, set[str]]] = {
    "prompt": {"requests.request", "results.response", "file files/files", AOF},
    "streamed": {"requests.request", "results.response", "Redis: gristmill.events.ID", AOF},
    "embedded": {"requests.request", AOF},
    "failed": {"requests.request", AOF},
    "running": {"requests.request", "Redis: unacked", AOF},
    "later": {"requests.request"},
    "label": {"open_jobs.metadata", "results.metadata", "job_batches.metadata"},
    "key": {"job_keys.idempotency_key", "job_batches.idempotency_key"},
    "path": {"open_jobs.webhook_url", "results.webhook_url", "webhook_deliveries.url"},
    "endpoint": {"webhook_endpoints.url", "webhook_deliveries.url"},
    "named": {"webhook_endpoints.name"},
    "name": {"files.filename"},
    "custom": {"job_batch_lines.custom_id", "file files/files"},
    "stored": {"file files/files"},
    "purged": {AOF},
    "misread": {AOF},
    "asked": set(),
    "refused": set(),
}
"""Where a word is, by what it was given as, when all is done. (And in Postgres' own files.)"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    system = Up(tmp_path_factory.mktemp("canaries"), SETTINGS, LOUD)
    try:
        system.wait_until_ready()
        yield system
    finally:
        system.end()


@dataclass
class Tenant:
    """What a tenant sends, and the ids of what it has then, by how paths name them."""

    name: str
    http: httpx.Client
    hooks: Receiver
    ids: dict[str, list[str]] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)

    def word(self, kind: str) -> str:
        return canary(self.name, kind)

    def post(self, path: str, given: Any, **more: Any) -> dict[str, Any]:
        answer = self.http.post(path, json=given, **more)
        assert answer.is_success, (path, answer.text)
        is_json = answer.headers["content-type"].startswith("application/json")
        return dict(answer.json()) if is_json else {}

    def have(self, what: str, id: str) -> str:
        self.ids.setdefault(what, []).append(id)
        return id

    def submit(self, prompt: str, **given: Any) -> str:
        job = {
            "body": {"prompt": prompt, "max_tokens": 100},
            "metadata": {"label": self.word("label")},
            "idempotency_key": self.word("key"),
            "webhook_url": self.hooks.url("/" + self.word("path")),
        }
        return self.have("job_id", self.post("/v1/jobs", job | given)["id"])

    def state(self, job_id: str) -> str:
        return str(self.http.get(f"/v1/jobs/{job_id}", params={"wait": 60}).json()["state"])

    def has_in_worker(self, job_id: str) -> bool:
        timeline = self.http.get(f"/v1/jobs/{job_id}/timeline").raise_for_status().json()
        return timeline["awaits"] in ("batch", "engine")

    def deliveries(self, asked: dict[str, str]) -> list[dict[str, Any]]:
        answer = self.http.get("/v1/webhook_deliveries", params=asked)
        return list(answer.json()["data"])

    def until(self, path: str, name: str, value: str) -> None:
        eventually(lambda: self.http.get(path).json()[name] == value, timeout_s=60)

    # ── doors ──

    def submits_jobs(self) -> None:
        done = self.submit(self.word("prompt"))
        failed = self.submit(self.word("failed") + "\nnan")
        streamed = self.submit(self.word("streamed"), stream_events=True)
        bulk = {"jobs": [{"body": {"prompt": self.word("prompt")}}] * 2}
        many = [item["id"] for item in self.post("/v1/jobs/bulk", bulk)["items"]]
        with self.http.stream("GET", f"/v1/jobs/{streamed}/events") as events:
            assert canary(self.name, "streamed")[:-32] in events.read().decode()
        assert {self.state(id) for id in (done, streamed, *many)} == {"completed"}
        assert self.state(failed) == "failed"
        again = self.have("job_id", self.post(f"/v1/jobs/{failed}/replay", None)["id"])
        assert self.state(again) == "failed"
        self.post("/v1/jobs?dry_run=true", {"body": {"prompt": self.word("asked")}})
        self.submit(self.word("later"), not_before="2999-01-01T00:00:00Z")

    def purges_jobs(self) -> None:
        for later in ({}, {"not_before": "2999-01-01T00:00:00Z"}):
            word, path = self.word("purged"), None if later else "/" + self.word("purged")
            job_id = self.submit(
                word,
                metadata={"label": word},
                idempotency_key=word,
                webhook_url=path and self.hooks.url(path),
                stream_events=True,
                **later,
            )
            if path:
                assert self.state(job_id) == "completed"
                told = {"object_id": job_id, "state": "delivered"}
                eventually(lambda told=told: self.deliveries(told), 30)
            assert self.http.delete(f"/v1/jobs/{job_id}").status_code == 204

    def pushes_messages(self, service: Celery) -> None:
        """Straight into Redis, good ones and ones that are refused."""
        headers = {"tenant": self.name}
        sent = [
            service.send_task(f"inference.{task}", kwargs=given, headers=headers).id
            for task, given in (
                ("generate", {"prompt": self.word("prompt")}),
                ("generate", {"prompt": [self.word("misread"), 7]}),
                ("unknown", {"prompt": self.word("misread")}),
            )
        ]
        for job_id in sent[:2]:
            one = f"/v1/jobs/{self.have('job_id', job_id)}"
            eventually(lambda one=one: self.http.get(one).status_code == 200, timeout_s=30)
        assert [self.state(id) for id in sent[:2]] == ["completed", "failed"]

    def calls_as_openais_clients_do(self) -> None:
        def chat(kind: str) -> dict[str, Any]:
            return STUB | {"messages": [{"role": "user", "content": self.word(kind)}]}

        labelled = {"metadata": {"a": self.word("label")}}
        self.post("/v1/chat/completions", chat("prompt") | labelled)
        self.post("/v1/chat/completions", chat("streamed") | {"stream": True})
        self.post("/v1/completions", STUB | {"prompt": self.word("prompt")})
        self.post("/v1/embeddings", {"model": "stub-embed", "input": self.word("embedded")})

        def response(kind: str) -> dict[str, Any]:
            return {"model": "stub", "input": self.word(kind), "max_output_tokens": 100}

        self.post("/v1/responses", response("streamed") | {"stream": True})
        made = self.post("/v1/responses", response("prompt") | {"background": True})["id"]
        self.until(f"/v1/responses/{self.have('response_id', made)}", "status", "completed")
        after = response("prompt") | {"previous_response_id": made}
        self.have("response_id", self.post("/v1/responses", after)["id"])
        self.post("/v1/responses/input_tokens", {"model": "stub", "input": self.word("asked")})

    def calls_as_anthropics_clients_do(self) -> None:
        def asked(kind: str) -> dict[str, Any]:
            return STUB | {"messages": [{"role": "user", "content": self.word(kind)}]}

        self.post("/v1/messages", asked("prompt"))
        self.post("/v1/messages", asked("streamed") | {"stream": True})
        counted = {name: it for name, it in asked("asked").items() if name != "max_tokens"}
        self.post("/v1/messages/count_tokens", counted)
        lines = [{"custom_id": self.word("custom"), "params": asked("prompt")}]
        batch = self.post("/v1/messages/batches", {"requests": lines})["id"]
        one = f"/v1/messages/batches/{self.have('batch_id', batch)}"
        self.until(one, "processing_status", "ended")

    def uploads_files_and_runs_batches(self) -> None:
        def line(**body: Any) -> bytes:
            asked = STUB | {"messages": [{"role": "user", "content": self.word("prompt")}]}
            url = "/v1/chat/completions"
            line = {"custom_id": self.word("custom"), "method": "POST", "url": url}
            return json.dumps(line | {"body": asked | body}).encode()

        self.upload(self.word("stored").encode(), "user_data")
        for lines, state in (
            ([line(), line(n=self.word("stored"))], "completed"),
            ([line(), b'{"custom_id": "' + self.word("stored").encode() + b'", but'], "failed"),
        ):
            asked = {
                "input_file_id": self.upload(b"\n".join(lines), "batch"),
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
                "metadata": {"a": self.word("label")},
            }
            headers = {"Idempotency-Key": self.word("key")}
            batch = self.post("/v1/batches", asked, headers=headers)["id"]
            self.until(f"/v1/batches/{self.have('batch_id', batch)}", "status", state)

    def upload(self, data: bytes, purpose: str) -> str:
        file = (self.word("name") + ".jsonl", data)
        form: dict[str, Any] = {"files": {"file": file}, "data": {"purpose": purpose}}
        answer = self.http.post("/v1/files", **form)
        assert answer.is_success, answer.text
        return self.have("file_id", answer.json()["id"])

    def receives_webhooks(self) -> None:
        url = self.hooks.url("/" + self.word("endpoint"))
        given = {"name": self.word("named"), "url": url, "event_types": ["job.completed"]}
        made = self.have("webhook_endpoint_id", self.post("/v1/webhook_endpoints", given)["id"])
        self.post(f"/v1/webhook_endpoints/{made}/test", {"event_type": "job.completed"})
        eventually(lambda: any("endpoint0" in each.path for each in self.hooks.hooks), 30)
        listed = self.http.get("/v1/webhook_deliveries", params={"limit": 1}).json()["data"]
        self.have("delivery_id", listed[0]["id"])

    def is_refused(self) -> None:
        """Whatever is wrong with a body, its words are not what it is told by."""
        known = self.submit(self.word("prompt"), idempotency_key=(key := self.word("key")))
        assert self.state(known) == "completed"
        for path, rest in DOORS.items():
            for wrong in wrong_bodies(self.word("refused"), rest):
                data = wrong if isinstance(wrong, str) else json.dumps(wrong)
                headers = {"Content-Type": "application/json"}
                self.refused(self.http.post(path, content=data, headers=headers))
        conflict = {"body": {"prompt": self.word("refused")}, "idempotency_key": key}
        self.refused(self.http.post("/v1/jobs", json=conflict))
        other = {"x-api-key": self.word("refused"), "Authorization": self.word("refused")}
        self.refused(self.http.get("/v1/jobs", headers=other))
        for what in ("jobs", "files", "batches", "responses"):
            assert self.http.get(f"/v1/{what}/{self.word('refused')}").status_code == 404

    def refused(self, answer: httpx.Response) -> None:
        assert 400 <= answer.status_code < 500, answer.text
        self.refusals.append(answer.text + str(answer.headers))


DOORS: Final[dict[str, dict[str, Any]]] = {
    "/v1/jobs": {"body": {"messages": "WORD"}},
    "/v1/chat/completions": STUB | {"messages": "WORD"},
    "/v1/completions": STUB | {"prompt": "WORD"},
    "/v1/embeddings": {"model": "stub-embed", "input": "WORD"},
    "/v1/responses": {"model": "stub", "input": "WORD"},
    "/v1/messages": STUB | {"messages": "WORD"},
    "/v1/messages/batches": {"requests": "WORD"},
    "/v1/webhook_endpoints": {"name": "a", "url": "WORD", "event_types": "WORD"},
}


def wrong_bodies(word: str, rest: dict[str, Any]) -> Iterator[Any]:
    """Bodies with a word in them that nothing becomes of."""
    yield f'{{"{word}": '
    yield f'"{word}"'
    yield [word]
    for wrong in ({"a": word}, [word, 7], [[{"content": word}]], word + "\0"):
        yield json.loads(json.dumps(rest).replace('"WORD"', json.dumps(wrong)))
    yield rest | {"model": [word, 1.5]}


def test_each_word_is_where_it_is_meant_to_be_and_nowhere_else(system: Up) -> None:
    # given two tenants who do all that can be done, while somebody listens in
    run, cage = system.run_file, Cage()
    keys = {name: made_key(run["database.url"], name).text for name in TENANTS}
    admins = made_key(run["database.url"], "default", Scope.ADMIN).text
    with ExitStack() as held:
        held.enter_context(overheard(cage, run["database.url"], run["broker.url"], DONE))
        service = held.enter_context(Celery(broker=run["broker.url"], set_as_current=False))
        tenants = []
        for name in TENANTS:
            http = held.enter_context(client(run["api.port"], keys[name]))
            tenants.append(Tenant(name, http, held.enter_context(receiving())))
        for tenant in tenants:
            tenant.receives_webhooks()
            tenant.submits_jobs()
            tenant.purges_jobs()
            tenant.pushes_messages(service)
            tenant.calls_as_openais_clients_do()
            tenant.calls_as_anthropics_clients_do()
            tenant.uploads_files_and_runs_batches()
            tenant.is_refused()
        for tenant in tenants:
            job_id = tenant.submit(tenant.word("running") + "\nsleep 600000")
            eventually(partial(tenant.has_in_worker, job_id))

        # when everything is looked through
        look_in_postgres(cage, run["database.url"])
        look_in_redis(cage, run["broker.url"])
        look_at_pages(cage, run, admins, [id for each in tenants for id in each.ids["job_id"]])
        for tenant in tenants:
            cage.look("errors", str(tenant.refusals))
            cage.look("webhooks", str([(each.headers, each.body) for each in tenant.hooks.hooks]))
        told = [answers_to(*each) for each in (tenants, tenants[::-1])]
    look_in_processes(cage, system.processes())
    look_in_files(cage, system.cache_dir)

    # then
    for name, (other, answers) in zip(TENANTS, told, strict=True):
        assert f"canary{name}" in answers
        assert f"canary{other}" not in answers
    for kind, places in PLACES.items():
        for name in TENANTS:
            assert cage.places(kind, name) - {"file postgres/data"} == places, (kind, name)
    assert {each.kind for each in cage.seen} <= set(PLACES)


def answers_to(asker: Tenant, other: Tenant) -> tuple[str, str]:
    """The other one's name, and what all that can be read tells a tenant who has his ids."""
    told = ""
    app = create_app(Settings(database={"url": "postgresql://"}, models=STUB_MODELS))
    for route in iter_route_contexts(app.routes):
        if not isinstance(route.original_route, APIRoute) or "GET" not in (route.methods or ()):
            continue
        path = str(route.path)
        names = [each.alias for each in route.dependant.path_params]
        ids = other.ids.get(names[0], ["stub"]) if names else []
        for it in [path.replace("{" + names[0] + "}", id) for id in ids] or [path]:
            answer = asker.http.get(it)
            assert answer.status_code < 500, it
            told += answer.text + str(answer.headers)
    return other.name, told


def look_at_pages(cage: Cage, run: dict[str, Any], admins_key: str, job_ids: list[str]) -> None:
    with client(run["api.port"], admins_key) as api:
        cage.look("metrics", api.get("/metrics").raise_for_status().text)
    with client(run["flower.port"], "") as flower:
        tasks = flower.get("/api/tasks").raise_for_status().text
        assert set(job_ids) & set(json.loads(tasks))
        pages = ["/", "/tasks", "/broker", "/workers?json=1", "/api/workers", "/metrics"]
        for page in [*pages, *(f"/task/{id}" for id in job_ids)]:
            cage.look("Flower", flower.get(page).text)
        cage.look("Flower", tasks)


def client(port: int, key: str) -> httpx.Client:
    url = f"http://127.0.0.1:{port}"
    return httpx.Client(base_url=url, headers={"x-api-key": key}, timeout=120, trust_env=False)
