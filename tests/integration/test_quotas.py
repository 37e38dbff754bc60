"""Limits of tenants, from the command that sets them to the call that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import httpx
import pytest
from sqlalchemy import text

from app import cli
from app.config.settings import Settings
from app.errors import QuotaExceeded
from app.intake import quotas as intake
from app.intake.quotas import Tenants
from app.local.ports import free_port
from app.store import quotas as store
from app.store import submissions
from app.store.database import Database
from app.store.isolation import Connection
from app.store.quotas import Quotas
from tests.apis import Hands, made_key, running_api
from tests.rows import new_job
from tests.waiting import eventually

Gristmill = Callable[..., tuple[int, str, str]]
BODY = {"body": {"prompt": "A grist mill is", "max_tokens": 16}}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits are read anew for each call."""
    monkeypatch.setattr(intake, "FRESH_S", 0.0)


@pytest.fixture
def gristmill(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    database_url: str,
    redis_url: str,
) -> Gristmill:
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", database_url)
    monkeypatch.setenv("GRISTMILL_BROKER__URL", redis_url)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def mill(settings: Settings) -> Iterator[httpx.Client]:
    """A client of the tenant `mill`."""
    with running_api(settings) as client:
        client.headers["x-api-key"] = made_key(settings.database.url, "mill").text
        yield client


@pytest.fixture
def hands(database_url: str) -> Iterator[Hands]:
    with closing(Hands(database_url)) as hands:
        yield hands


def limit(database: Database, **quotas: object) -> None:
    with database.begin() as connection:
        store.keep(connection, "mill", Quotas(**quotas), actor="test")  # type: ignore[arg-type]


def submit(mill: httpx.Client, number: int = 1, key: str | None = None) -> httpx.Response:
    if number > 1:
        return mill.post("/v1/jobs/bulk", json={"jobs": [BODY] * number})
    return mill.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": key} if key else {})


def test_open_jobs_are_bounded_and_an_end_of_any_kind_gives_one_back(
    mill: httpx.Client, database: Database
) -> None:
    limit(database, max_open_jobs=2)
    first = submit(mill).json()["id"]
    assert submit(mill).status_code == 202

    refused = submit(mill)

    assert refused.status_code == 429
    problem = refused.json()
    assert problem["type"].endswith("http-problem-types#quota-exceeded")
    assert problem["violated-policies"] == ["max_open_jobs"]
    assert "2 jobs" in problem["detail"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    mill.post(f"/v1/jobs/{first}/cancel")
    assert submit(mill).status_code == 202
    assert submit(mill).status_code == 429


def test_a_bulk_that_passes_a_limit_leaves_nothing_behind(
    mill: httpx.Client, database: Database
) -> None:
    limit(database, max_open_jobs=5)

    assert submit(mill, 6).status_code == 429
    assert submit(mill, 5).json()["accepted"] == 5

    with database.begin() as connection:
        assert store.holding(connection, "mill").jobs == 5


def test_what_was_submitted_before_and_is_named_again_is_never_refused(
    mill: httpx.Client, database: Database
) -> None:
    limit(database, max_open_jobs=1)
    job = submit(mill, key="one").json()["id"]

    assert submit(mill, key="one").json()["id"] == job
    assert submit(mill, key="two").status_code == 429


def test_submissions_at_the_same_time_do_not_pass_a_limit_together(
    mill: httpx.Client, database: Database
) -> None:
    limit(database, max_open_jobs=5)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: submit(mill).status_code, range(16)))

    assert sorted(answers) == [202] * 5 + [429] * 11


def test_queued_tokens_are_bounded_and_those_of_a_job_that_runs_are_given_back(
    mill: httpx.Client, database: Database, hands: Hands
) -> None:
    job = submit(mill).json()["id"]
    with database.begin() as connection:
        tokens = store.holding(connection, "mill").queued_tokens
    assert tokens > 16
    limit(database, max_queued_tokens=2 * tokens - 1)
    refused = submit(mill)
    assert refused.json()["violated-policies"] == ["max_queued_tokens"]

    hands.claim(job)

    assert submit(mill).status_code == 202


def test_other_tenants_are_not_held_against_a_limit(
    mill: httpx.Client, database: Database, settings: Settings
) -> None:
    limit(database, max_open_jobs=1)
    theirs = {"x-api-key": made_key(settings.database.url, "bakery").text}

    for _ in range(3):
        assert mill.post("/v1/jobs", json=BODY, headers=theirs).status_code == 202

    assert submit(mill).status_code == 202


def test_a_tenant_that_has_spent_its_budget_is_told_and_not_to_come_back_soon(
    mill: httpx.Client, database: Database, hands: Hands
) -> None:
    limit(database, max_cost_per_day=Decimal("0.0000001"), currency="USD")
    job = submit(mill).json()["id"]
    hands.finish(hands.claim(job))  # for 0.00000012

    refused = submit(mill)

    assert refused.status_code == 429
    assert refused.json()["code"] == "insufficient_quota"
    soon = datetime.now(UTC) + timedelta(seconds=60)
    if soon.date() == datetime.now(UTC).date():
        assert refused.headers["x-should-retry"] == "false"
        assert "retry-after" not in refused.headers
    assert refused.json()["violated-policies"] == ["max_cost_per_day"]
    assert "0.0000001 USD" in refused.json()["detail"]
    limit(database, max_cost_per_month=Decimal(1), currency="USD")
    assert submit(mill).status_code == 202


def test_each_door_tells_of_a_limit_in_its_own_words(
    hands: Hands, mill: httpx.Client, database: Database
) -> None:
    limit(database, max_cost_per_month=Decimal(0), currency="USD")
    chat = {"messages": [{"role": "user", "content": "A mill?"}], "max_tokens": 4}

    openai = mill.post("/v1/chat/completions", json=chat)
    anthropic = mill.post("/v1/messages", json=chat)

    assert (openai.status_code, anthropic.status_code) == (429, 429)
    assert openai.json()["error"]["type"] == "insufficient_quota"
    assert anthropic.json()["error"]["type"] == "rate_limit_error"


def test_limits_are_set_listed_and_removed_by_a_command(
    gristmill: Gristmill, database: Database
) -> None:
    code, _, told = gristmill(
        *("tenants", "set", "mill", "--weight", "3", "--max-open-jobs", "7"),
        *("--max-cost-per-day", "2.50", "--currency", "USD"),
    )
    assert (code, told.strip()) == (0, "The tenant mill is set.")
    assert gristmill("tenants", "set", "mill", "--max-open-jobs", "none")[0] == 0

    [_, mill] = json.loads(gristmill("tenants", "list", "--json")[1])

    assert mill == {
        "tenant": "mill",
        "weight": 3,
        "max_requests_per_minute": None,
        "max_open_jobs": None,
        "max_queued_tokens": None,
        "max_cost_per_day": "2.5",
        "max_cost_per_month": None,
        "currency": "USD",
    }
    assert "mill" in gristmill("tenants", "list")[1]


@pytest.mark.parametrize(
    "wrong",
    [
        ("--max-open-jobs", "0"),
        ("--max-open-jobs", "-1"),
        ("--max-open-jobs", "99999999999"),
        ("--max-queued-tokens", "many"),
        ("--max-cost-per-day", "NaN", "--currency", "USD"),
        ("--max-cost-per-day", "-1", "--currency", "USD"),
        ("--max-cost-per-day", "1"),
        ("--currency", "dollars"),
        ("--weight", "0"),
        (),
    ],
)
def test_a_limit_that_is_none_is_refused(gristmill: Gristmill, wrong: tuple[str, ...]) -> None:
    code, _, told = gristmill("tenants", "set", "mill", *wrong)

    assert code == 2
    assert "Traceback" not in told


def test_calls_a_minute_are_counted_told_and_refused(
    mill: httpx.Client, database: Database, settings: Settings
) -> None:
    limit(database, max_requests_per_minute=3)

    left = [submit(mill).headers["ratelimit"] for _ in range(3)]
    refused = submit(mill)

    assert [each.partition(";t=")[0] for each in left] == [f'"requests";r={n}' for n in (2, 1, 0)]
    assert refused.status_code == 429
    assert refused.json()["code"] == "rate_limit_exceeded"
    assert refused.json()["violated-policies"] == ["max_requests_per_minute"]
    assert refused.headers["ratelimit-policy"] == '"requests";q=3;w=60'
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    reading = mill.get("/v1/jobs")
    assert (reading.status_code, "ratelimit" in reading.headers) == (200, False)
    theirs = {"x-api-key": made_key(settings.database.url, "bakery").text}
    assert mill.post("/v1/jobs", json=BODY, headers=theirs).status_code == 202


def test_a_rate_holds_across_processes(
    mill: httpx.Client, database: Database, settings: Settings
) -> None:
    limit(database, max_requests_per_minute=4)
    with running_api(settings) as other:
        other.headers["x-api-key"] = mill.headers["x-api-key"]

        answers = [submit(client).status_code for client in (mill, other) * 3]

    assert answers == [202] * 4 + [429] * 2


def test_while_redis_is_away_no_call_is_refused_for_its_rate(
    make_settings: Callable[..., Settings], database: Database, database_url: str
) -> None:
    limit(database, max_requests_per_minute=1)
    nowhere = {"url": f"redis://127.0.0.1:{free_port()}/0", "publish_timeout_s": 0.5}
    settings = make_settings(database={"url": database_url}, broker=nowhere)
    with running_api(settings) as client:
        client.headers["x-api-key"] = made_key(database_url, "mill").text

        assert [submit(client).status_code for _ in range(3)] == [202] * 3


def test_a_submission_waits_for_what_another_is_about_to_commit(database: Database) -> None:
    limit(database, max_open_jobs=1)
    tenants = Tenants(database, lambda *_: Decimal(0))
    bounded = tenants.bounded(["mill"])

    def write(connection: Connection) -> None:
        submissions.insert_jobs(connection, [new_job(tenant="mill")])
        tenants.enforce(connection, bounded, datetime.now(UTC))

    def write_another() -> None:
        with database.begin() as connection:
            write(connection)

    def waits() -> bool:
        held_up = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)"
        with database.begin() as connection:
            return bool(connection.scalar(text(held_up)))

    with ThreadPoolExecutor(1) as threads:
        with database.begin() as first:
            write(first)
            second = threads.submit(write_another)
            eventually(lambda: second.done() or waits())
            assert not second.done()
        with pytest.raises(QuotaExceeded):
            second.result(30)
