"""Batches by OpenAI's own client: over a real socket, with a worker and rescue."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import openai
import psycopg
import pytest

from app import objects
from app.batches import Door, LineFile, id_in
from app.config.settings import Settings
from app.errors import StorageUnavailable
from app.files import id_in as file_id_in
from app.files import key_of
from app.intake.batches import feed, output_file
from app.intake.batches.keeper import BatchKeeper
from app.local.servers import EmbeddedRedis
from app.objects import Objects, OpenWriter
from app.store import job_batches, quotas
from app.store.database import Database
from app.store.job_batches import BatchView
from app.store.quotas import Quotas
from tests.apis import running_api
from tests.conftest import STUB_MODELS
from tests.rescues import running_rescue
from tests.rows import Worker
from tests.waiting import eventually
from tests.workers import rows, running_worker

CHAT = "/v1/chat/completions"


def line(number: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    default = {
        "model": "stub",
        "messages": [{"role": "user", "content": f"wheel {number}"}],
        "max_tokens": 16,
    }
    return {
        "custom_id": f"line-{number}",
        "method": "POST",
        "url": url,
        "body": body or default,
    }


def jsonl(*lines: dict[str, Any] | bytes) -> bytes:
    return b"\n".join(
        each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines
    )


def make_settings(url: str, redis: str, folder: Path, **given: Any) -> Settings:
    defaults = {
        "cache_dir": str(folder),
        "database": {"url": url},
        "broker": {"url": redis},
        "rescue": {"sweep_ms": 100},
        "models": STUB_MODELS,
    }
    return Settings.model_validate(defaults | given)


@contextmanager
def sdk(api: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=str(api.base_url).rstrip("/") + "/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


@pytest.fixture(scope="module")
def system(
    empty_databases: Callable[[str], str],
    migrated_template: str,
    redis_server: EmbeddedRedis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Settings, openai.OpenAI, httpx.Client]]:
    """A whole system with stub models."""
    folder = tmp_path_factory.mktemp("system")
    settings = make_settings(empty_databases(migrated_template), redis_server.url, folder)
    with (
        running_api(settings) as api,
        running_worker(settings, folder / "worker"),
        running_rescue(settings, folder / "rescue"),
        sdk(api) as client,
    ):
        yield settings, client, api


@pytest.fixture
def client(system: tuple[Settings, openai.OpenAI, httpx.Client]) -> openai.OpenAI:
    return system[1]


def upload(client: openai.OpenAI, *lines: dict[str, Any] | bytes) -> str:
    return client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch").id


def submit(client: openai.OpenAI, *lines: dict[str, Any] | bytes, **given: Any) -> Any:
    defaults: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h"}
    return client.batches.create(input_file_id=upload(client, *lines), **defaults | given)


ENDED = {"completed", "failed", "expired", "cancelled"}


def ended(client: openai.OpenAI, batch: Any) -> Any:
    def look() -> Any:
        now = client.batches.retrieve(batch.id)
        counts = now.request_counts
        assert counts is not None and counts.completed + counts.failed <= counts.total
        return now if now.status in ENDED else None

    return eventually(look, timeout_s=60)


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(each) for each in client.files.content(file_id).read().splitlines()]


def test_a_batch_goes_from_its_file_to_its_answers(client: openai.OpenAI) -> None:
    batch = submit(
        client, *(line(n) for n in range(25)), b"", line(99, model="stub", messages="no"),
        metadata={"customer": "42"},
    )  # fmt: skip
    assert batch.status == "validating" and batch.id.startswith("batch_")
    assert batch.expires_at == batch.created_at + 86_400

    done = ended(client, batch)

    assert done.status == "completed" and done.model == "stub"
    assert done.metadata == {"customer": "42"} and done.errors is None
    assert (done.request_counts.total, done.request_counts.completed) == (26, 25)
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    answers = {each["custom_id"]: each for each in lines_of(client, done.output_file_id)}
    assert set(answers) == {f"line-{n}" for n in range(25)}
    for n in range(25):
        each = answers[f"line-{n}"]
        assert each["error"] is None and each["response"]["status_code"] == 200
        body = each["response"]["body"]
        assert body["object"] == "chat.completion"
        assert f"wheel {n}" in body["choices"][0]["message"]["content"]
    [wrong] = lines_of(client, done.error_file_id)
    assert wrong["custom_id"] == "line-99" and wrong["response"]["status_code"] == 400
    assert (
        wrong["response"]["body"]["error"]["param"]
        == "messages"
        == wrong["error"].get("param", "messages")
    )
    usage = [each["response"]["body"]["usage"] for each in answers.values()]
    assert done.usage.input_tokens == sum(each["prompt_tokens"] for each in usage)
    assert done.usage.output_tokens == sum(each["completion_tokens"] for each in usage)
    for file_id in (done.output_file_id, done.error_file_id):
        file = client.files.retrieve(file_id)
        assert file.purpose == "batch_output" and file.status == "processed"
        assert file.bytes == len(client.files.content(file_id).read())
        assert file.expires_at == file.created_at + 30 * 86_400


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"model": "stub", "prompt": "mill"}),
        ("/v1/embeddings", {"model": "stub-embed", "input": "mill"}),
        ("/v1/classify", {"model": "stub-classify", "input": "mill"}),
        ("/v1/rerank", {"model": "stub-rerank", "query": "mill", "documents": ["a", "b"]}),
        ("/v1/score", {"model": "stub-rerank", "text_1": "mill", "text_2": "b"}),
        (
            "/v1/messages",
            {"model": "stub", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]},
        ),
        ("/v1/responses", {"model": "stub", "input": "mill"}),
    ],
)
def test_every_call_may_be_a_batch(client: openai.OpenAI, url: str, body: dict[str, Any]) -> None:
    batch = submit(client, line(1, url, **body), endpoint=url)

    done = ended(client, batch)

    [answer] = lines_of(client, done.output_file_id)
    assert done.endpoint == url and answer["response"]["status_code"] == 200
    assert done.error_file_id is None


def test_a_batch_of_wrong_lines_fails_and_says_which(client: openai.OpenAI) -> None:
    batch = submit(
        client,
        line(1),
        b"{",
        line(1),
        {key: value for key, value in line(2).items() if key != "custom_id"},
        line(3, "/v1/embeddings"),
        line(4, model="gpt-9", messages=[]),
    )

    done = ended(client, batch)

    assert done.status == "failed" and done.failed_at and done.output_file_id is None
    found = [(each.line, each.code, each.param) for each in done.errors.data]
    assert found == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "missing_required_parameter", "custom_id"),
        (5, "invalid_url", "url"),
        (6, "model_not_found", "body.model"),
    ]
    assert done.request_counts.total == 0
    with pytest.raises(openai.ConflictError) as refused:
        client.batches.cancel(batch.id)
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert "Cannot cancel a batch with status 'failed'" in refused.value.message


def test_a_file_that_is_not_there_is_told_by_the_batch(client: openai.OpenAI) -> None:
    batch = client.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    assert batch.status == "validating" and batch.input_file_id == "file-none"

    done = ended(client, batch)

    [error] = done.errors.data
    assert (done.status, error.code, error.param, error.line) == (
        "failed",
        "invalid_request",
        "file_id",
        None,
    )
    assert "Cannot find file file-none" in error.message


def test_all_failed_is_completed_without_an_output(client: openai.OpenAI) -> None:
    done = ended(client, submit(client, line(1, model="stub", messages="no")))

    assert done.status == "completed" and done.output_file_id is None
    assert len(lines_of(client, done.error_file_id)) == 1
    assert (done.request_counts.completed, done.request_counts.failed) == (0, 1)


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({"endpoint": "/v1/x"}, "endpoint", "invalid_value"),
        ({"endpoint": None}, "endpoint", "missing_required_parameter"),
        ({"endpoint": 3}, "endpoint", "invalid_type"),
        ({"completion_window": "1h"}, "completion_window", "invalid_value"),
        ({"completion_window": ""}, "completion_window", "invalid_value"),
        ({"metadata": {"tags": []}}, "metadata.tags", "invalid_type"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", None),
        ({"metadata": []}, "metadata", "invalid_type"),
        ({"output_expires_after": {"anchor": "x"}}, "output_expires_after.anchor", None),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            "output_expires_after.seconds",
            None,
        ),
        ({"input_file_id": None}, "input_file_id", "missing_required_parameter"),
        ({"input_file_id": "\0"}, "input_file_id", None),
        ({"idempotency_key": ""}, "idempotency_key", None),
        ({"requests": []}, "requests", None),
        ({"requests": 5}, "requests", None),
        ({"requests": [{}]}, "requests", None),  # and a file
    ],
)
def test_what_is_wrong_with_a_batch_itself_is_told_at_once(
    system: tuple[Settings, openai.OpenAI, httpx.Client],
    given: dict[str, Any],
    param: str,
    code: str | None,
) -> None:
    api = system[2]
    right = {"input_file_id": "file-none", "endpoint": CHAT, "completion_window": "24h"}

    refused = api.post("/v1/batches", json=right | given)

    error = refused.json()["error"]
    assert refused.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert code is None or error["code"] == code


@pytest.mark.parametrize(
    "name", ["batch_0", "batch_" + "0" * 32, "0" * 32, "file-" + "0" * 32, "batch_" + "g" * 32]
)
def test_an_unknown_batch_is_not_found(client: openai.OpenAI, name: str) -> None:
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError) as refused:
            call(name)
        assert f"No batch found with id '{name}'" in refused.value.message


def test_batches_are_listed_newest_first(client: openai.OpenAI) -> None:
    made = [
        client.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h").id
        for _ in range(5)
    ]

    first = client.batches.list(limit=2)
    assert [each.id for each in first.data] == made[:2:-1] and first.has_more
    everything = [each.id for each in client.batches.list(limit=2)]
    assert everything[:5] == made[::-1] and len(everything) == len(set(everything))
    with pytest.raises(openai.BadRequestError):
        client.batches.list(limit=101)


def test_the_same_key_is_the_same_batch(client: openai.OpenAI) -> None:
    file_id = upload(client, line(1))

    def create(**given: Any) -> Any:
        defaults: dict[str, Any] = {
            "input_file_id": file_id,
            "endpoint": CHAT,
            "completion_window": "24h",
        }
        return client.batches.create(**defaults | given)

    one = create(extra_body={"idempotency_key": "nightly"})
    again = create(extra_body={"idempotency_key": "nightly"})
    by_header = create(extra_headers={"Idempotency-Key": '"nightly"'})
    with pytest.raises(openai.ConflictError) as refused:
        create(extra_body={"idempotency_key": "nightly"}, metadata={"a": "b"})

    assert one.id == again.id == by_header.id
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_a_batch_may_bring_its_requests_along(
    system: tuple[Settings, openai.OpenAI, httpx.Client],
) -> None:
    _, client, api = system
    body = line(0)["body"]
    requests = [{"custom_id": "a", "body": body}, {"body": body}, line(7)]
    asked = {"endpoint": CHAT, "requests": requests, "idempotency_key": "inline"}

    batch = api.post("/v1/batches", json=asked).json()
    again = api.post("/v1/batches", content=json.dumps(asked, indent=3), headers=JSON).json()
    other = api.post("/v1/batches", json=asked | {"requests": requests[:2]})

    assert batch["id"] == again["id"] and other.status_code == 409
    done = ended(client, client.batches.retrieve(batch["id"]))
    answers = [each["custom_id"] for each in lines_of(client, done.output_file_id)]
    assert sorted(answers) == ["a", "line-7", "request-2"]
    assert client.files.retrieve(done.input_file_id).purpose == "batch"


JSON = {"Content-Type": "application/json"}


@contextmanager
def keeping(settings: Settings) -> Iterator[BatchKeeper]:
    """The keeper of batches in a thread of the test, without the rest of rescue."""
    keeper = BatchKeeper(settings)
    stop = threading.Event()
    thread = threading.Thread(target=keeper.keep, args=(stop,))
    thread.start()
    try:
        yield keeper
    finally:
        stop.set()
        thread.join()


def half_done(settings: Settings, api: httpx.Client) -> str:
    """A batch of 60 lines of which 10 have an answer, 10 are jobs that wait, and the others are
    none yet; its id."""
    waiting = "SELECT id FROM open_jobs WHERE state = 'queued'"
    with sdk(api) as client, keeping(settings), closing(Database(settings.database.url)) as store:
        batch = submit(client, *(line(n) for n in range(60)))
        ids = [row["id"] for row in eventually(lambda: ten(rows(settings, waiting)))]
        worker = Worker.registered(store)
        worker.complete(worker.claim(ids))
        eventually(lambda: client.batches.retrieve(batch.id).request_counts.completed == 10)  # type: ignore[union-attr]
        eventually(lambda: ten(rows(settings, waiting)))
        return str(batch.id)


def ten(found: list[Any]) -> list[Any]:
    return found if len(found) == 10 else []


@pytest.fixture
def few_at_once(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    return make_settings(
        database_url,
        redis_url,
        tmp_path / "cache",
        job_batches={"max_open_lines": 10},
    )


def test_a_batch_that_is_cancelled_half_way_keeps_what_was_finished(
    few_at_once: Settings, tmp_path: Path
) -> None:
    with running_api(few_at_once) as api, sdk(api) as client:
        batch_id = half_done(few_at_once, api)
        before = client.batches.retrieve(batch_id)

        told = client.batches.cancel(batch_id)
        again = client.batches.cancel(batch_id)
        with keeping(few_at_once):
            done = ended(client, told)

        assert told.status == again.status == "cancelling" and told.cancelling_at
        assert done.status == "cancelled" and done.cancelled_at
        check_kept(client, before, done, "batch_cancelled")
        assert client.batches.cancel(batch_id).status == "cancelled"
        assert rows(few_at_once, "SELECT FROM open_jobs") == []


def test_a_batch_whose_time_is_over_keeps_what_was_finished(
    few_at_once: Settings, tmp_path: Path
) -> None:
    with running_api(few_at_once) as api, sdk(api) as client:
        batch_id = half_done(few_at_once, api)
        before = client.batches.retrieve(batch_id)

        with psycopg.connect(few_at_once.database.url) as connection:
            connection.execute("UPDATE job_batches SET expires_at = now()")
            connection.execute("UPDATE open_jobs SET deadline = now()")
        with keeping(few_at_once), running_rescue(few_at_once, tmp_path / "rescue"):
            done = ended(client, before)

        assert done.status == "expired" and done.expired_at
        check_kept(client, before, done, "batch_expired")


def check_kept(client: openai.OpenAI, before: Any, done: Any, code: str) -> None:
    answers = lines_of(client, done.output_file_id)
    errors = lines_of(client, done.error_file_id)
    assert len(answers) >= before.request_counts.completed >= 10
    assert len(answers) == done.request_counts.completed
    assert len(errors) == done.request_counts.failed > 0
    assert {each["error"]["code"] for each in errors} == {code}
    assert all(each["response"] is None for each in errors)
    told = [each["custom_id"] for each in answers + errors]
    assert sorted(told) == sorted(f"line-{n}" for n in range(60))


def test_what_is_finished_can_be_read_while_a_batch_runs(
    few_at_once: Settings, tmp_path: Path
) -> None:
    with running_api(few_at_once) as api, sdk(api) as client:
        batch = client.batches.retrieve(half_done(few_at_once, api))
        assert batch.status == "in_progress" and batch.output_file_id

        def part(offset: int) -> tuple[list[bytes], str, int]:
            answer = api.get(f"/v1/files/{batch.output_file_id}/content", params={"offset": offset})
            assert answer.status_code == 200
            last = int(answer.headers["X-Last-Line"])
            return answer.content.splitlines(), answer.headers["X-Incomplete"], last

        first, is_incomplete, last = part(0)
        rest, _, _ = part(7)
        assert is_incomplete == "true" and len(first) == last >= 10 and rest == first[7:]
        assert part(last)[0] == []
        assert client.files.retrieve(batch.output_file_id).status == "uploaded"
        with pytest.raises(openai.ConflictError):
            client.files.delete(batch.output_file_id)

        with (
            running_rescue(few_at_once, tmp_path / "rescue"),
            running_worker(few_at_once, tmp_path / "worker"),
        ):
            done = ended(client, batch)

        assert done.output_file_id == batch.output_file_id
        whole, is_incomplete, last = part(0)
        assert is_incomplete == "false" and last == 60 and whole[: len(first)] == first
        assert part(58)[0] == whole[58:]
        assert client.files.delete(done.output_file_id).deleted


def test_long_lines_are_read_and_written_one_at_a_time(
    few_at_once: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_file, "PAGE_BYTES", 1)
    with running_api(few_at_once) as api, closing(Database(few_at_once.database.url)) as database:
        batch_id = half_done(few_at_once, api)
        with database.begin() as connection:
            view = job_batches.writing(connection, id_in(Door.OPENAI, batch_id), tenant="default")
        assert view is not None

        pages = list(output_file.pages(database, view, LineFile.OUTPUT))

        assert len(pages) == view.counts.output >= 10
        assert [page.count(b"\n") for page in pages] == [1] * len(pages)


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_batch_whose_input_is_lost_waits_for_it_and_ends_all_the_same(
    few_at_once: Settings, caplog: pytest.LogCaptureFixture, is_cancelled: bool
) -> None:
    with running_api(few_at_once) as api, sdk(api) as client:
        running = client.batches.retrieve(half_done(few_at_once, api))
        unread = submit(client, line(1))
        for batch in (running, unread):
            id = file_id_in(batch.input_file_id)
            assert id is not None
            Objects.of(few_at_once).delete(key_of(id))
        with closing(BatchKeeper(few_at_once)) as keeper:
            end_open_jobs(few_at_once)
            while keeper.round():
                pass
            assert "not in the storage" in caplog.text
            assert client.batches.retrieve(running.id).status == "in_progress"
            assert client.batches.retrieve(unread.id).status == "validating"

            if is_cancelled:
                for batch in (running, unread):
                    client.batches.cancel(batch.id)
            else:
                with psycopg.connect(few_at_once.database.url) as connection:
                    connection.execute("UPDATE job_batches SET expires_at = now()")
            while keeper.round():
                pass

        done, never_begun = (client.batches.retrieve(batch.id) for batch in (running, unread))
        assert done.status == ("cancelled" if is_cancelled else "expired")
        assert never_begun.status == ("cancelled" if is_cancelled else "failed")
        assert len(lines_of(client, done.output_file_id)) == done.request_counts.completed == 20
        told = [each["custom_id"] for each in lines_of(client, done.error_file_id)]
        assert told == [""] * 40 and done.request_counts.failed == 40


def end_open_jobs(settings: Settings) -> None:
    with closing(Database(settings.database.url)) as store:
        worker = Worker.registered(store)
        ids = [row["id"] for row in rows(settings, "SELECT id FROM open_jobs")]
        worker.complete(worker.claim(ids))


def test_a_storage_that_goes_away_while_answers_are_written_delays_them_and_leaves_nothing(
    few_at_once: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = {"write": 1, "close": 1}

    class Failing(OpenWriter):
        def write(self, data: bytes) -> None:
            super().write(data)
            self.fail("write")

        def close(self) -> None:
            self.fail("close")
            super().close()

        def fail(self, what: str) -> None:
            if away[what]:
                away[what] -= 1
                raise StorageUnavailable("It is away.")

    monkeypatch.setattr(objects, "OpenWriter", Failing)
    with running_api(few_at_once) as api, sdk(api) as client:
        batch = submit(client, *(line(n) for n in range(5)))
        with closing(BatchKeeper(few_at_once)) as keeper:
            looks = iter(range(20))
            while client.batches.retrieve(batch.id).status != "completed":
                assert next(looks, None) is not None
                keeper.round()
                end_open_jobs(few_at_once)

        done = client.batches.retrieve(batch.id)
        assert len(lines_of(client, done.output_file_id)) == 5 and not any(away.values())
        folder = Path(few_at_once.cache_dir) / "files" / "files"
        kept = [file_id_in(id) for id in (done.input_file_id, done.output_file_id)]
        assert {file.name for file in folder.iterdir()} == {id.hex for id in kept if id}


def test_blank_rows_without_end_hold_up_nobody(
    few_at_once: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "SLICE_S", 0.0)
    with running_api(few_at_once) as api, sdk(api) as client:
        data = jsonl(line(1)) + b"\n" * 3_000_000 + jsonl(line(2))
        id = client.files.create(file=("in.jsonl", data), purpose="batch").id
        batch = client.batches.create(input_file_id=id, endpoint=CHAT, completion_window="24h")
        with closing(BatchKeeper(few_at_once)) as keeper:
            steps = 0
            while keeper.round():
                steps += 1

        [found] = rows(few_at_once, "SELECT fed, total FROM job_batches")
        assert (found["fed"], found["total"]) == (2, 2) and steps > 3
        assert client.batches.retrieve(batch.id).status == "in_progress"


def test_every_line_has_one_answer_whoever_is_killed_meanwhile(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = make_settings(
        database_url,
        redis_url,
        tmp_path / "cache",
        worker={"lease_s": 2, "heartbeat_s": 0.5},
        job_batches={"max_open_lines": 100},
    )
    num = 300
    with running_api(settings) as api, sdk(api) as client:
        batch = submit(client, *(line(n) for n in range(num)))

        def has_done(least: int) -> bool:
            counts = client.batches.retrieve(batch.id).request_counts
            assert counts is not None
            return counts.completed >= least

        with (
            running_rescue(settings, tmp_path / "rescue"),  # both are killed at the end
            running_worker(settings, tmp_path / "worker"),
        ):
            eventually(partial(has_done, 40), timeout_s=60)
        with psycopg.connect(settings.database.url) as connection:  # no need to wait it out
            connection.execute("UPDATE job_batches SET keeper_until = now() - interval '1 s'")
        with (
            running_rescue(settings, tmp_path / "rescue"),
            running_worker(settings, tmp_path / "worker"),
        ):
            ended_as = ended(client, batch)

        answers = [each["custom_id"] for each in lines_of(client, ended_as.output_file_id)]
        assert sorted(answers) == sorted(f"line-{n}" for n in range(num))
        assert ended_as.error_file_id is None
        one_job_each = "SELECT job_id FROM job_batch_lines GROUP BY 1 HAVING count(*) > 1"
        assert rows(settings, one_job_each) == []
        assert len(rows(settings, "SELECT FROM jobs")) == num


def test_others_have_half_of_the_queue_whatever_a_batch_is(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = make_settings(
        database_url, redis_url, tmp_path / "cache", api={"port": 0, "max_queued_jobs": 40}
    )
    with running_api(settings) as api, sdk(api) as client, keeping(settings):
        batch = submit(client, *(line(n) for n in range(100)))
        waiting = "SELECT FROM open_jobs WHERE priority = 6"
        eventually(lambda: len(rows(settings, waiting)) >= 15)
        time.sleep(0.5)  # whatever it would do now, it would do too much

        assert len(rows(settings, waiting)) <= 20
        for n in range(10):
            answer = api.post("/v1/jobs", json={"body": {"prompt": f"{n}"}})
            assert answer.status_code == 202, answer.text
        assert client.batches.retrieve(batch.id).status == "in_progress"


def test_a_batch_keeps_to_the_limits_of_its_tenant_and_goes_on_as_they_give_back(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = make_settings(database_url, redis_url, tmp_path / "cache")
    with (
        running_api(settings) as api,
        sdk(api) as client,
        closing(Database(database_url)) as store,
    ):
        with store.begin() as connection:
            quotas.keep(connection, "default", Quotas(max_open_jobs=10), actor="test")
        waiting, most = "SELECT id FROM open_jobs WHERE state = 'queued'", 0
        with keeping(settings):
            batch = submit(client, *(line(n) for n in range(25)))
            worker = Worker.registered(store)
            while client.batches.retrieve(batch.id).status not in ENDED:
                ids = [row["id"] for row in rows(settings, waiting)]
                most = max(most, len(ids))
                if ids:
                    worker.complete(worker.claim(ids))
                time.sleep(0.02)

        done = client.batches.retrieve(batch.id)
        assert (done.status, done.request_counts.completed) == ("completed", 25)  # type: ignore[union-attr]
        assert most <= 10


def test_a_batch_is_cancelled_however_much_others_have_in_the_queue(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = make_settings(
        database_url, redis_url, tmp_path / "cache", api={"port": 0, "max_queued_jobs": 40}
    )
    with running_api(settings) as api, sdk(api) as client:
        with keeping(settings):
            batch = submit(client, *(line(n) for n in range(60)))
            eventually(lambda: client.batches.retrieve(batch.id).status == "in_progress")
        for n in range(40 - len(rows(settings, "SELECT FROM open_jobs"))):
            api.post("/v1/jobs", json={"body": {"prompt": f"{n}"}})
        client.batches.cancel(batch.id)
        with keeping(settings):
            done = ended(client, batch)

        assert done.status == "cancelled"
        assert len(lines_of(client, done.error_file_id)) == 60


def test_a_batch_that_waits_for_its_tenants_limits_and_another_go_on_beside_each_other(
    database_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "PAGE", 20)
    settings = make_settings(database_url, redis_url, tmp_path / "cache")
    with (
        running_api(settings) as api,
        sdk(api) as client,
        closing(Database(database_url)) as store,
        closing(BatchKeeper(settings)) as keeper,
    ):
        with store.begin() as connection:
            quotas.keep(connection, "default", Quotas(max_open_jobs=5), actor="test")
        bounded = submit(client, *(line(n) for n in range(25)))
        other = submit(client, *(line(n) for n in range(400)))
        with psycopg.connect(database_url) as connection:
            connection.execute(
                "UPDATE job_batches SET tenant = 'bakery' WHERE id = %s",
                [other.id.removeprefix("batch_")],
            )
        for _ in range(12):
            keeper.round()

        first, second = (
            row["fed"] for row in rows(settings, "SELECT fed FROM job_batches ORDER BY id")
        )
        assert first == 5 and 40 < second < 400 and bounded.id < other.id


def test_what_nobody_foresaw_in_one_batch_keeps_no_other_one_waiting(
    few_at_once: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running_api(few_at_once) as api, sdk(api) as client:
        odd, other = (submit(client, line(n)) for n in range(2))
        rows_of = feed.Feed.rows_of

        def odd_rows_of(self: feed.Feed, batch: BatchView, **given: Any) -> Any:
            if batch.id == UUID(odd.id.removeprefix("batch_")):
                raise RecursionError("a prompt")
            return rows_of(self, batch, **given)

        monkeypatch.setattr(feed.Feed, "rows_of", odd_rows_of)
        with closing(BatchKeeper(few_at_once)) as keeper:
            for _ in range(3):
                keeper.round()

        assert client.batches.retrieve(odd.id).status == "validating"
        assert client.batches.retrieve(other.id).status == "in_progress"
        assert "RecursionError" in caplog.text and "a prompt" not in caplog.text


def test_results_stay_until_they_are_written_however_short_they_are_kept(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = make_settings(
        database_url,
        redis_url,
        tmp_path / "cache",
        retention={"results_days": 0, "prompts_days": 0},
        rescue={"sweep_ms": 50},
    )
    with (
        running_api(settings) as api,
        sdk(api) as client,
        running_rescue(settings, tmp_path / "rescue"),
        running_worker(settings, tmp_path / "worker"),
    ):
        done = ended(client, submit(client, *(line(n) for n in range(50))))

        answers = lines_of(client, done.output_file_id)
        assert len(answers) == 50
        assert all(each["response"]["body"]["choices"] for each in answers)
        eventually(lambda: not rows(settings, "SELECT FROM results WHERE response IS NOT NULL"))


def test_a_line_whose_job_is_deleted_by_hand_is_told(few_at_once: Settings, tmp_path: Path) -> None:
    with running_api(few_at_once) as api, sdk(api) as client:
        now_s = [0.0]
        with closing(BatchKeeper(few_at_once, now_s=lambda: now_s[0])) as keeper:
            batch = submit(client, line(1))
            for _ in range(3):
                keeper.round()
            with psycopg.connect(few_at_once.database.url) as connection:
                connection.execute("DELETE FROM jobs")
            now_s[0] += 60
            while keeper.round():
                pass

        done = client.batches.retrieve(batch.id)
        [gone] = lines_of(client, done.error_file_id)
        assert done.status == "completed" and gone["error"]["code"] == "job_removed"
