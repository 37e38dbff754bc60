"""The Python client against the real API and a real worker with stub models."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from app.config.settings import Settings
from gristmill_client import AsyncClient, Client, Job, JobFailed, JobState
from gristmill_client.errors import GristmillError, JobNotFound, JobStateConflict, ModelNotFound
from tests.apis import running_api
from tests.workers import running_worker

SECRET = "the miller's secret"


@pytest.fixture
def url(settings: Settings, tmp_path: Path) -> Iterator[str]:
    with running_worker(settings, tmp_path / "worker"), running_api(settings) as api:
        yield str(api.base_url)


def test_a_service_submits_waits_and_reads(url: str) -> None:
    with Client(url) as gristmill:
        job_id = gristmill.submit({"prompt": "round and round", "max_tokens": 32})

        result = gristmill.result(job_id, timeout_s=30)

        assert "round and round" in result["choices"][0]["text"]
        job = gristmill.job(job_id)
        assert job.state is JobState.COMPLETED
        assert job.raw["usage"]["input_tokens"] == len("round and round")
        assert job.raw["batch"]["close_reason"] in ("wait", "join")

        ids = gristmill.submit_many(
            [{"body": {"prompt": f"grain {n}"}, "priority": n % 10} for n in range(20)]
            + [{"body": {"prompt": "x", "model": "gpt-9"}}]
        )
        refused = ids.pop()
        assert isinstance(refused, ModelNotFound) and refused.param == "body.model"
        for n, each in enumerate(ids):
            assert isinstance(each, str)
            assert f"grain {n}" in gristmill.result(each, timeout_s=30)["choices"][0]["text"]


def test_an_asyncio_service_does_the_same(url: str) -> None:
    async def scenario() -> None:
        async with AsyncClient(url) as gristmill:
            ids = await asyncio.gather(
                *(gristmill.submit({"input": f"wheel {n}"}) for n in range(10))
            )
            results = await asyncio.gather(*(gristmill.result(each, 30) for each in ids))
            assert all(result["data"][0]["embedding"] for result in results)

            [one] = await gristmill.submit_many([{"body": {"prompt": "grain"}}])
            assert isinstance(one, str)
            assert (await gristmill.wait(one, 30)).state is JobState.COMPLETED
            with pytest.raises(JobStateConflict):
                await gristmill.cancel(one)

    asyncio.run(scenario())


def test_cancelling_frees_the_job_and_its_result_says_so(url: str) -> None:
    with Client(url) as gristmill:
        job_id = gristmill.submit({"prompt": "sleep 60000", "max_tokens": 1_000})

        gristmill.cancel(job_id)

        with pytest.raises(JobFailed, match="cancelled") as ended:
            gristmill.result(job_id, timeout_s=30)
        assert ended.value.job.state is JobState.CANCELLED


def test_submissions_and_waits_go_through_a_restart_of_the_api(settings: Settings) -> None:
    # given a client whose API has just gone
    with running_api(settings) as api:
        url = str(api.base_url)
    away = threading.Event()
    with (
        Client(url, on_pause=lambda *_: away.set()) as gristmill,
        ThreadPoolExecutor() as threads,
    ):
        # when it submits, and waits for what it submitted, while the API is away
        submitted = threads.submit(gristmill.submit_many, [{"body": {"prompt": "grain"}}] * 3)
        assert away.wait(20)
        with running_api(settings, api.base_url.port or 0):
            ids = submitted.result(60)
        away.clear()
        waited = [threads.submit(gristmill.wait, str(each), timeout_s=60) for each in ids]
        assert away.wait(20)
        with running_api(settings, api.base_url.port or 0):
            for each in ids:
                gristmill.cancel(str(each))

            # then nothing is lost or doubled, and nobody gave up
            assert {each.result(60).state for each in waited} == {JobState.CANCELLED}
            assert sorted(job.id for job in gristmill.jobs()) == sorted(map(str, ids))


def test_many_jobs_are_followed_cancelled_and_purged(url: str) -> None:
    with Client(url) as gristmill:
        # given jobs that end, and some that run for long or wait
        quick = [
            str(each) for each in gristmill.submit_many({"body": {"prompt": p}} for p in "abc")
        ]
        label, later = {"run": "long"}, datetime.now(UTC) + timedelta(hours=1)
        long = [gristmill.submit({"prompt": "x"}, metadata=label, not_before=later) for _ in "ab"]

        # then they come as they end, with their answers
        ended = dict(gristmill.as_completed([*quick, "no-such-job"], timeout_s=60))
        assert isinstance(ended.pop("no-such-job"), JobNotFound)
        answers = [ended[each] for each in quick]
        assert [job.response["choices"][0]["text"] for job in answers if isinstance(job, Job)] == [
            "a",
            "b",
            "c",
        ]
        with pytest.raises(TimeoutError, match="2 jobs have not ended"):
            list(gristmill.as_completed(long, timeout_s=0.5))

        # and are looked at, listed, cancelled and purged, one by one or by what they are
        shown = gristmill.jobs_status([*long, "no-such-job"])
        assert [each.id if isinstance(each, Job) else each.code for each in shown] == [
            *long,
            "job_not_found",
        ]
        assert {job.id for job in gristmill.jobs(metadata=label, state="queued")} == set(long)
        [refused] = gristmill.cancel_many(quick[:1])
        assert isinstance(refused.error, JobStateConflict)
        assert {each.id for each in gristmill.cancel_chosen(metadata=label)} == set(long)
        gristmill.purge(quick[0])
        assert gristmill.job(quick[0]).response is None
        assert gristmill.limits()["max_ids"] == 1_000


def test_an_unknown_job_is_an_error_of_its_own(url: str) -> None:
    with Client(url) as gristmill, pytest.raises(JobNotFound):
        gristmill.wait("no-such-job")


def test_no_prompt_is_logged_whatever_becomes_of_it(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), running_api(settings) as api:
        with Client(str(api.base_url)) as gristmill:
            gristmill.submit({"prompt": SECRET})
            for wrong in ({"prompt": SECRET, "n": 0}, {"prompt": SECRET + "\0"}):
                with pytest.raises(GristmillError):
                    gristmill.submit(wrong)
        for raw in (f'{{"body": "{SECRET}', f'{{"{SECRET}": 1}}', f'{{"body": {{"{SECRET}": 1}}}}'):
            answer = httpx.post(
                api.base_url.join("/v1/jobs"),
                content=raw,
                headers={"content-type": "application/json"},
            )
            assert answer.status_code == 400

    assert caplog.records
    assert SECRET not in caplog.text
