"""Usage over HTTP, of jobs that a worker ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.config.settings import Settings
from app.store import usage
from app.store.database import Database
from app.store.translation import TookTooLong
from tests.apis import running_api
from tests.integration.test_store_usage import ended


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as client:
        yield client


def test_a_question_that_takes_postgres_too_long_is_refused_and_not_tried_again(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> None:
        raise TookTooLong("too long")

    monkeypatch.setattr(usage, "ask", slow)

    answer = api.get("/v1/usage?by=metadata.customer")

    assert answer.status_code == 400 and "a shorter period" in answer.text


def test_usage_is_told_by_what_is_asked_and_refused_in_a_sentence(
    api: httpx.Client, database: Database
) -> None:
    assert api.get("/v1/usage").json()["data"] == []
    ended(database, 2, metadata={"customer": "42"})
    ended(database, 1, priority=3)

    def ask(query: str) -> list[dict[str, Any]]:
        answer = api.get(f"/v1/usage?{query}")
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"])

    [day] = ask("by=day,model")
    assert (day["energy_joules"], day["energy_method"], day["energy_jobs"]) == (
        6e-6, "measured", 3
    )  # fmt: skip
    assert day["jobs"] == {"completed": 3, "failed": 0, "cancelled": 0, "expired": 0}
    assert (day["input_tokens"], day["cached_tokens"], day["output_tokens"]) == (30, 12, 15)
    assert (day["cost"], day["currency"]) == ("0.000000009", "EUR")
    assert day["group"]["model"] == "smollm2" and day["group"]["day"].endswith("T00:00:00Z")
    assert [row["group"] for row in ask("by=priority")] == [{"priority": 0}, {"priority": 3}]
    assert [row["cost"] for row in ask("by=&metadata[customer]=42")] == ["0.000000006"]
    assert {row["group"]["metadata.customer"] for row in ask("by=metadata.customer")} == {
        "42", None
    }  # fmt: skip
    assert ask("since=2001-01-01T00:00:00Z&until=2001-02-01T00:00:00Z&by=hour") == []

    for query, says in (
        ("by=modell", "Did you mean model?"),
        ("since=2027-01-01T00:00:00", "must name its zone"),
        ("since=2027-01-01T00:30:00Z", "full hour"),
        ("since=2027-02-01T00:00:00Z&until=2027-01-01T00:00:00Z", "before until"),
        ("zone=Asia/Kolkata", "not whole hours"),
        ("zone=localtime", "zone"),
        ("by=metadata.%00", "usage can be told by"),
        ("tenant=%00", "NUL"),
        ("top=0", "top"),
        ("bye=day", "Did you mean by?"),
    ):
        answer = api.get(f"/v1/usage?{query}")
        assert answer.status_code == 400 and says in answer.text, answer.text
