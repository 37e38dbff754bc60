"""A job's events over HTTP, from a real worker: told once, in order, and to the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery

from app.config.settings import Settings
from app.local.servers import EmbeddedRedis
from gristmill_client import Client
from tests.apis import running_api
from tests.own_redis import running_redis
from tests.rescues import running_rescue
from tests.sse import Sse, following, text_of
from tests.waiting import eventually
from tests.workers import Worker, rows, running_worker

TOLD_ONCE = ("started", "tokens", "restarted", "end")
PROMPT = "the mill by the water grinds rye"


STUB = {
    "source": "stub",
    "engine": "stub",
    "kind": "generate",
    "default": True,
    "max_wait_ms": 5,
    "default_max_tokens": 256,
    "options": {"step_ms": 10, "joins": True},
}


@pytest.fixture(scope="module")
def config(
    empty_databases: Callable[[str], str], migrated_template: str, redis_server: EmbeddedRedis
) -> Settings:
    return Settings(
        database={"url": empty_databases(migrated_template)},
        broker={"url": redis_server.url.removesuffix("/0") + "/127"},
        worker={"lease_s": 3, "heartbeat_s": 0.5, "grace_s": 5},
        models={"stub": STUB},
        prices={"cpu": {"per_device_hour": "0.036", "currency": "USD"}},
    )


@pytest.fixture(scope="module")
def api(config: Settings) -> Iterator[httpx.Client]:
    with running_api(config) as api:
        yield api


@pytest.fixture(scope="module")
def first_worker(config: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(config, tmp_path_factory.mktemp("worker"))
    yield worker
    worker.kill()


@pytest.fixture
def worker(first_worker: Worker) -> Worker:
    """One that runs; a test before may have killed it."""
    return first_worker.start() if first_worker.is_down else first_worker


def submit(api: httpx.Client, prompt: str = PROMPT, stream: bool = True, **body: Any) -> str:
    job = {"body": {"prompt": prompt} | body, "stream_events": stream}
    answer = api.post("/v1/jobs", json=job)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def all_events(api: httpx.Client, job_id: str, after: str | None = None) -> list[Sse]:
    with following(api, job_id, after) as events:
        return list(events)


def kinds(events: list[Sse]) -> list[str]:
    return list(dict.fromkeys(each.event for each in events))


def test_a_job_tells_where_it_waits_when_it_begins_its_tokens_and_its_end(
    api: httpx.Client, worker: Worker
) -> None:
    events = all_events(api, submit(api))

    assert kinds(events)[-3:] == ["started", "tokens", "end"]
    assert text_of(events) == PROMPT
    started = next(each for each in events if each.event == "started")
    assert started.id == "1-0"
    assert started.data["attempt"] == 1 and started.data["batch"]["size"] == 1
    tokens = [each for each in events if each.event == "tokens"]
    assert [each.id for each in tokens] == [f"1-{n}" for n in range(1, len(tokens) + 1)]
    assert sum(each.data["tokens"] for each in tokens) == len(PROMPT) + 1  # and the one that ends
    end = events[-1].data
    assert end["complete"]
    assert end["job"]["state"] == "completed"
    assert end["job"]["response"]["choices"][0]["text"] == PROMPT
    assert end["job"]["batch"]["id"] == started.data["batch"]["id"]


def test_a_job_that_did_not_ask_for_it_has_no_tokens_and_its_whole_result_at_the_end(
    api: httpx.Client, worker: Worker
) -> None:
    events = all_events(api, submit(api, stream=False))

    assert set(kinds(events)) <= {"queued", "end"}
    assert not events[-1].data["complete"]
    assert events[-1].data["job"]["response"]["choices"][0]["text"] == PROMPT


def test_a_stream_that_is_cut_goes_on_with_no_gap_and_no_repeat(
    api: httpx.Client, worker: Worker
) -> None:
    # given a listener that leaves after each few events, while the job runs
    job_id = submit(api, PROMPT * 2)
    had: list[Sse] = []
    after: str | None = None

    # when it comes back each time with the last id
    while not had or had[-1].event != "end":
        with following(api, job_id, after) as events:
            for number, each in enumerate(events):
                had.append(each)
                after = each.id or after
                if number == 4:
                    break

    # then it has had all, once
    ids = [each.id for each in had if each.event in ("started", "tokens")]
    assert ids == [f"1-{n}" for n in range(len(ids))]
    assert text_of(had) == had[-1].data["job"]["response"]["choices"][0]["text"]


def test_who_comes_after_the_end_is_told_all_the_same(api: httpx.Client, worker: Worker) -> None:
    job_id = submit(api, logprobs=1)
    first = all_events(api, job_id)

    again = all_events(api, job_id)
    rest = all_events(api, job_id, "1-5")

    tokens = [each for each in first if each.event == "tokens"]
    assert [each for each in again if each.event == "tokens"] == tokens
    assert [each.id for each in rest if each.event == "tokens"] == [each.id for each in tokens[5:]]
    assert again[-1].data["complete"] and rest[-1].data["complete"]
    assert tokens[0].data["logprobs"] == [0.0]


def test_each_choice_of_several_prompts_has_its_index(api: httpx.Client, worker: Worker) -> None:
    events = all_events(api, submit(api, ["rye", "wheat 漢字🙂"], n=2))

    assert [text_of(events, index) for index in range(4)] == ["rye"] * 2 + ["wheat 漢字🙂"] * 2


def test_many_listeners_of_one_job_are_told_the_same(api: httpx.Client, worker: Worker) -> None:
    job_id = submit(api, PROMPT * 2)

    with ThreadPoolExecutor(30) as pool:
        told = list(pool.map(lambda _: all_events(api, job_id), range(30)))

    answers = [[each for each in events if each.event in TOLD_ONCE] for events in told]
    assert all(each == answers[0] for each in answers)
    assert text_of(told[0]) == PROMPT * 2
    assert api.get("/v1/limits").json()["streams"] == 0


def test_beyond_the_limit_a_listener_is_told_to_come_back(config: Settings) -> None:
    few = config.api.model_copy(update={"max_streams": 1})
    with running_api(config.model_copy(update={"api": few})) as api:
        later = {"not_before": "2099-01-31T12:00:00Z", "stream_events": True}
        job_id = api.post("/v1/jobs", json={"body": {"prompt": "x"}} | later).json()["id"]
        with following(api, job_id) as events:
            assert next(events).event == "queued"
            assert "\ngristmill_streams 1.0" in api.get("/metrics").text
            refused = api.get(f"/v1/jobs/{job_id}/events")
            assert (refused.status_code, refused.json()["code"]) == (503, "busy")
            assert refused.headers["retry-after"]
        eventually(lambda: api.get("/v1/limits").json()["streams"] == 0)


def test_a_job_ends_with_its_whole_result_though_redis_went_away_in_the_middle(
    config: Settings, tmp_path: Path
) -> None:
    with running_redis(tmp_path) as redis:
        broker = config.broker.model_copy(update={"url": redis.url})
        config = config.model_copy(update={"broker": broker})
        # given a job that has told some tokens
        with (
            running_api(config) as api,
            running_worker(config, tmp_path / "worker"),
            following(api, submit(api, PROMPT * 4)) as events,
        ):
            had = list(islice((each for each in events if each.event == "tokens"), 5))

            # when Redis is gone for good
            redis.stop()
            had += events

    # then what was told is a beginning of the answer, which comes whole
    text = had[-1].data["job"]["response"]["choices"][0]["text"]
    assert had[-1].event == "end" and not had[-1].data["complete"]
    assert text == PROMPT * 4
    assert text.startswith(text_of(had)) and text_of(had)


def test_a_job_that_runs_again_tells_so_and_then_all_tokens_anew(
    api: httpx.Client, worker: Worker, config: Settings, tmp_path: Path
) -> None:
    # given a listener that has had some tokens
    job_id = submit(api, PROMPT * 4)
    had: list[Sse] = []
    with following(api, job_id) as events:
        for each in events:
            had.append(each)
            if each.event == "tokens" and len(had) > 10:
                worker.kill()  # when its worker is killed, and another takes over
                break
        assert text_of(had)
        with (
            running_worker(config, tmp_path / "other"),
            running_rescue(config, tmp_path / "rescue"),
        ):
            had += events

    # then it is told so, and its text is that of the second run
    restarted = next(each for each in had if each.event == "restarted")
    assert restarted.data["attempt"] == 2 and restarted.id == "2-0"
    assert had[-1].data["complete"]
    assert text_of(had) == had[-1].data["job"]["response"]["choices"][0]["text"] == PROMPT * 4


def test_another_tenants_job_and_none_at_all_are_not_found(api: httpx.Client) -> None:
    nothing = api.get("/v1/jobs/00000000-0000-7000-8000-000000000000/events")
    assert nothing.status_code == 404
    assert nothing.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("last", ["x", "-1-2", "1", "1-", "99999999999-1", "٣-1"])
def test_what_is_no_events_id_is_refused(api: httpx.Client, last: str) -> None:
    url = "/v1/jobs/00000000-0000-7000-8000-000000000000/events"
    refused = api.get(url, headers={"Last-Event-ID": last.encode()})
    assert refused.status_code == 400
    assert refused.json()["param"] == "Last-Event-ID"


def test_the_client_streams_what_it_submits(api: httpx.Client, worker: Worker) -> None:
    with Client(str(api.base_url)) as gristmill:
        job_id = gristmill.submit({"prompt": PROMPT}, stream_events=True)
        events = list(gristmill.stream(job_id))
        told = [each for each in events if each.event == "tokens"]
        rest = list(gristmill.stream(job_id, after=told[2].id))

    assert "".join(each.text for each in events) == PROMPT
    assert [each for each in rest if each.event == "tokens"] == told[3:]
    assert events[-1].job is not None and events[-1].job.id == job_id


def test_a_job_that_a_service_sends_by_itself_may_ask_for_its_tokens(
    api: httpx.Client, worker: Worker, config: Settings
) -> None:
    with Celery("somebody-else", broker=config.broker.url, set_as_current=False) as service:
        sent = service.send_task(
            "inference.generate", kwargs={"prompt": PROMPT}, headers={"stream_events": True}
        )
    eventually(lambda: api.get(f"/v1/jobs/{sent.id}").status_code == 200)

    events = all_events(api, str(sent.id))

    assert events[-1].data["complete"] and text_of(events) == PROMPT


def test_a_replay_streams_if_its_job_did(api: httpx.Client, config: Settings) -> None:
    later = {"not_before": "2099-01-31T12:00:00Z"}
    for stream in (True, False):
        job = {"body": {"prompt": "x"}, "stream_events": stream} | later
        job_id = api.post("/v1/jobs", json=job).json()["id"]
        assert api.post(f"/v1/jobs/{job_id}/cancel").status_code == 200

        again = api.post(f"/v1/jobs/{job_id}/replay").json()["id"]

        found = rows(config, "SELECT stream_events FROM jobs WHERE id = %s", again)
        assert found == [{"stream_events": stream}]
