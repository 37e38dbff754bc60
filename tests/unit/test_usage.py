"""What may be asked of usage, what follows from its sums, and how the command shows it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import cli
from app.books.energy import EnergyMethod
from app.books.usage import (
    DeviceTime,
    Filling,
    Usage,
    at_real_use,
    halves_of,
    hour_of,
    in_one_currency,
    num_jobs,
    parse_by,
    per_million,
    period_of,
    zone_of,
)
from app.cli import api as api_module
from app.cli.terminal import PlainConsole
from app.cli.usage import csv_of, time_of
from app.errors import RequestError
from app.jobs import FINAL_STATES, JobState
from gristmill_client import Client

NOW = datetime(2027, 2, 1, 12, 34, 56, tzinfo=UTC)


def used(currency: str | None = "EUR", **given: Any) -> Usage:
    jobs = dict.fromkeys(FINAL_STATES, 0) | {JobState.COMPLETED: given.pop("completed", 1)}
    return Usage(**{"group": {}, "currency": currency, "jobs": jobs} | given)


# ── questions ───────────────────────────────────────────────────────────────────────────────────


def test_keys_are_named_with_commas_between() -> None:
    assert parse_by("") == ()
    assert parse_by("day, model ,metadata.customer id") == ("day", "model", "metadata.customer id")


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ("modell", "Did you mean model?"),
        ("week", "Known are: hour, day, month"),
        ("metadata.", "nothing that usage"),
        ("day,hour", "one of hour, day and month"),
        ("model,model", "each key once"),
        (",".join(f"metadata.{n}" for n in range(7)), "up to 6"),
        ("x" * 1_000, "This key"),
        ("mo\x1b[31mdel", "This key"),
    ],
)
def test_a_key_that_is_none_is_refused_with_what_there_is(by: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as error:
        parse_by(by)
    assert "\x1b" not in str(error.value)


@given(st.text())
def test_any_text_is_keys_or_is_refused(text: str) -> None:
    with suppress(RequestError):
        assert all(parse_by(text)) or not parse_by(text)


def test_a_period_that_is_left_open_is_thirty_days_until_now_from_midnight() -> None:
    until = datetime(2027, 2, 1, 13, tzinfo=UTC)

    assert period_of(None, None, NOW, "UTC") == (datetime(2027, 1, 2, tzinfo=UTC), until)
    berlin = datetime(2027, 1, 1, 23, tzinfo=UTC)
    assert period_of(None, None, NOW, "Europe/Berlin") == (berlin, until)


@pytest.mark.parametrize(
    ("since", "until", "says"),
    [
        (NOW.replace(tzinfo=None, minute=0, second=0), None, "must name its zone"),
        (datetime(2027, 1, 1, 0, 30, tzinfo=UTC), None, "a full hour of UTC"),
        (datetime(2027, 1, 1, tzinfo=ZoneInfo("Asia/Kolkata")), None, "a full hour of UTC"),
        (NOW.replace(minute=0, second=0), hour_of(NOW), "since must be before until"),
        (hour_of(NOW), hour_of(NOW) - timedelta(hours=1), "since must be before until"),
        (datetime(2028, 1, 1, tzinfo=UTC), None, "since must be before until"),
    ],
)
def test_a_period_that_is_none_is_refused(
    since: datetime | None, until: datetime | None, says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        period_of(since, until, NOW, "UTC")


@given(st.datetimes(timezones=st.timezones()), st.datetimes(timezones=st.timezones()))
def test_any_two_times_are_a_period_of_whole_hours_or_are_refused(
    one: datetime, other: datetime
) -> None:
    try:
        since, until = period_of(one, other, NOW, "UTC")
    except RequestError:
        return
    assert since < until and since == hour_of(since) and until == hour_of(until)


def test_a_zone_that_is_not_whole_hours_away_at_any_time_of_the_period_is_refused() -> None:
    winter, summer = datetime(2027, 7, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)

    assert zone_of("America/New_York", winter, summer).key == "America/New_York"
    with pytest.raises(RequestError, match="not whole hours"):
        zone_of("Asia/Kolkata", winter)
    howe = "Australia/Lord_Howe"  # 10:30 in winter, 11 in summer
    with pytest.raises(RequestError, match="not whole hours"):
        zone_of(howe, *halves_of(summer, summer + timedelta(days=360)))
    for name in ("Mars/Olympus", "", "../etc/passwd", "\0", "x" * 5_000):
        with pytest.raises(RequestError, match="zone is a name"):
            zone_of(name)


# ── sums ────────────────────────────────────────────────────────────────────────────────────────


def test_a_million_tokens_cost_what_they_cost_and_no_tokens_have_no_price() -> None:
    assert per_million(Decimal("0.005"), 2_000_000) == Decimal("0.0025")
    assert per_million(Decimal("1"), 0) is None
    assert per_million(Decimal(10) ** 30, 1) == Decimal(10) ** 36
    assert used(input_tokens=3, output_tokens=1, cached_tokens=2).tokens == 4


def test_energy_is_known_as_well_as_that_of_the_worst_job_that_has_some() -> None:
    assert used().energy_method is EnergyMethod.ABSENT
    assert used(jobs_measured=2).energy_method is EnergyMethod.MEASURED
    assert used(jobs_measured=2, jobs_estimated=1).energy_method is EnergyMethod.ESTIMATED


def test_padding_is_a_share_of_what_was_computed_and_never_less_than_nothing() -> None:
    assert Filling(2, 9, 75, 100).padding_share == 0.25
    assert Filling(2, 9, 100, 75).padding_share == 0.0
    assert Filling(0, 0, 0, 0).padding_share is Filling(0, 0, 0, 0).mean_sequences is None
    assert (Filling(1, 2, 3, 4) + Filling(1, 2, 3, 4)).mean_sequences == 2.0


def test_jobs_that_ran_on_a_device_without_a_price_keep_a_row_of_their_own() -> None:
    ran = used(None, input_tokens=5, device_ns=9)

    assert list(in_one_currency([used("EUR"), ran])) == [used("EUR"), ran]


NS = st.integers(0, 10**15)


@given(st.lists(st.tuples(NS, NS, NS, st.integers(0, 10**12)), max_size=5))
def test_at_real_use_jobs_pay_for_all_of_the_time_that_devices_were_up(
    found: list[tuple[int, int, int, int]],
) -> None:
    """And at full use for what was billed."""
    devices = [
        DeviceTime(
            time=None, device="cpu", price_id="cpu", currency="EUR", price=Decimal("3.6"),
            up_ns=busy + idle + load, load_ns=load, busy_ns=busy, idle_ns=idle, waste_ns=0,
            overhead_ns=0, open_ns=0,
        )
        for busy, idle, load, _ in found
    ]  # fmt: skip
    billed = [
        used(cost=device.cost("busy"), upstream_cost=Decimal(0), input_tokens=tokens)
        for device, (*_, tokens) in zip(devices, found, strict=True)
    ]

    told = list(at_real_use(billed, devices, None))

    total = sum((device.cost("up") or Decimal(0) for device in devices), Decimal(0))
    if sum((row.cost for row in billed), Decimal(0)):
        spread = sum((row.real_cost or Decimal(0) for row in told), Decimal(0))
        assert abs(spread - total) <= len(told) * Decimal("0.000000001")
        assert all((row.real_cost or Decimal(0)) >= row.cost for row in told)
    else:
        assert [row.real_cost for row in told] == [None] * len(told)


def test_what_servers_elsewhere_asked_for_is_the_same_at_any_use() -> None:
    device = DeviceTime(
        time=None, device="cpu", price_id="cpu", currency="EUR", price=Decimal("3.6"),
        up_ns=4_000, load_ns=0, busy_ns=1_000, idle_ns=3_000, waste_ns=0, overhead_ns=0, open_ns=0,
    )  # fmt: skip
    row = used(cost=Decimal("5.000000001"), upstream_cost=Decimal(5), output_tokens=2)

    [told] = at_real_use([row], [device], None)
    [other] = at_real_use([used("USD")], [device], None)

    assert told.real_cost == Decimal("5.000000004") and other.real_cost is None
    assert told.real_cost_per_million_tokens == Decimal("2500000.002")


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from([None, "EUR", "USD"]), st.integers(0, 9)),
        unique_by=lambda row: row[:2],
    )
)
def test_jobs_without_a_currency_join_one_of_their_group_and_none_is_lost(
    rows: list[tuple[str, str | None, int]],
) -> None:
    made = [used(cur, group={"model": m}, completed=n) for m, cur, n in sorted(rows, key=str)]

    told = list(in_one_currency(made))

    assert num_jobs(told) == num_jobs(made)
    for model in "ab":
        currencies = [row.currency for row in told if row.group["model"] == model]
        assert len(currencies) == len(set(currencies))
        assert None not in currencies or currencies == [None]


# ── the command ─────────────────────────────────────────────────────────────────────────────────


def row(day: str, model: str | None, **given: Any) -> dict[str, Any]:
    return {
        "group": {"day": day, "model": model},
        "rest": False,
        "jobs": {"completed": 1200, "failed": 1, "cancelled": 0, "expired": 0},
        "input_tokens": 31_000,
        "cached_tokens": 16_000,
        "output_tokens": 64_000,
        "device_seconds": 512.25,
        "wasted_seconds": 0.0,
        "currency": "EUR",
        "cost": "0.005120000",
        "cost_per_million_tokens": "0.053894737",
        "cost_per_million_tokens_real": "0.081000000",
        "charge": "0",
        "energy_joules": None,
        "energy_method": "absent",
        "energy_jobs": 0,
        "wasted_joules": None,
        "carbon_grams": None,
        "mean_batch_size": 12.5,
        "mean_batch_sequences": 14.0,
        "padding_share": None,
    } | given


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, Any]]:
    """Run `gristmill usage` against these rows: exit code, output, what was asked."""

    def run(*arguments: str, rows: Any = (), devices: Any = ()) -> tuple[int, str, Any]:
        requests: list[httpx.Request] = []

        def answer(request: httpx.Request) -> httpx.Response:
            requests.append(request)
            by = [key for key in request.url.params["by"].split(",") if key]
            since, until = "2027-01-02T00:00:00Z", "2027-02-01T13:00:00Z"
            told = {"since": since, "until": until, "zone": "UTC", "by": by, "data": list(rows)}
            told["devices"] = list(devices)
            return httpx.Response(200, json=told)

        client = partial(Client, transport=httpx.MockTransport(answer))
        monkeypatch.setattr(api_module, "Client", client)
        out = io.StringIO()
        with redirect_stdout(out), pytest.raises(SystemExit) as end:
            cli.main(("usage", "--api-url", "http://localhost", *arguments))
        return int(end.value.code or 0), out.getvalue(), requests[0].url.params if requests else {}

    return run


def test_the_command_asks_for_full_hours_in_the_zone_that_is_named(asked: Any) -> None:
    code, _, params = asked(
        "--by", "day", "--by", "model", "--since", "2027-01-01", "--until", "2027-02-01T00:00Z",
        "--zone", "Europe/Berlin", "--priority", "0", "--metadata", "customer=42",
    )  # fmt: skip

    assert code == 0
    assert params["by"] == "day,model" and params["priority"] == "0"
    assert params["since"] == "2026-12-31T23:00:00+00:00"
    assert params["until"] == "2027-02-01T00:00:00+00:00"
    assert params["metadata[customer]"] == "42"


def test_how_long_ago_is_to_the_full_hour_and_what_is_no_time_is_said() -> None:
    assert time_of("7d", ZoneInfo("UTC"), NOW) == datetime(2027, 1, 25, 12, tzinfo=UTC)
    for text in ("yesterday", "7w", "2027-02-30", "999999999d", ""):
        with pytest.raises(RequestError, match="neither a time"):
            time_of(text, ZoneInfo("UTC"), NOW)


def test_a_wrong_option_is_a_sentence_and_exit_code_two(
    asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (("--since", "soon"), ("--zone", "Mars"), ("--top", "0"), ("--metadata", "x")):
        code, out, params = asked(*wrong)
        assert (code, out, params) == (2, "", {})
    assert "Traceback" not in capsys.readouterr().err


def test_the_same_rows_are_a_table_json_and_csv(asked: Any) -> None:
    rows = [
        row("2027-01-31T00:00:00Z", "smollm2"),
        row("2027-01-31T00:00:00Z", None, rest=True, currency=None, cost_per_million_tokens=None),
    ]

    _, table, _ = asked("--by", "day,model", rows=rows)
    _, text, _ = asked("--by", "day,model", "--format", "csv", rows=rows)
    _, lines, _ = asked("--by", "day,model", "--json", rows=rows)

    assert table.splitlines()[0].split("\t")[:3] == ["2027-01-31", "smollm2", "1200"]
    first, rest = csv.DictReader(io.StringIO(text))
    assert first["cost"] == "0.005120000" and first["jobs_completed"] == "1200"
    assert rest["model"] == "(others)" and rest["currency"] == ""
    assert '"data"' in lines


def test_where_the_time_of_devices_went_is_a_table_too(
    asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("up", "load", "busy", "idle", "waste", "overhead", "open")
    device = {
        "time": "2027-01-31T00:00:00Z", "device": "cpu", "price_id": None, "currency": None,
        "price_per_hour": None, "seconds": dict.fromkeys(parts, 1.5), "cost": None,
    }  # fmt: skip
    priced = device | {"price_id": "cpu", "currency": "EUR", "cost": dict.fromkeys(parts, "0.1")}

    _, text, _ = asked(
        "--by", "day,model", "--devices", "--format", "csv", devices=[device, priced]
    )
    free, paid = csv.DictReader(io.StringIO(text))

    assert (free["day"], free["idle_seconds"], free["idle_cost"]) == ("2027-01-31", "1.5", "")
    assert (paid["price"], paid["idle_cost"], paid["currency"]) == ("cpu", "0.1", "EUR")
    asked("--devices")
    assert "No device was up between" in capsys.readouterr().err


def test_a_person_reads_short_numbers_and_a_pipe_gets_them_whole(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("2027-01-31T00:00:00Z", "smollm2")]
    _, piped, _ = asked("--by", "day,model", rows=rows)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(PlainConsole, "is_terminal", property(lambda _: True))

    _, shown, _ = asked("--by", "day,model", rows=rows)

    assert "0.005120000" in piped and "31000" in piped
    assert "0.00512 " in shown and "31,000" in shown and "per 1M tokens" in shown


def test_focus_and_the_page_have_keys_of_their_own(asked: Any, tmp_path: Path) -> None:
    _, text, params = asked("--format", "focus")
    assert params["by"] == "day,tenant,model,price" and text.startswith("AllocatedMethodDetails,")
    for wrong in (("--by", "model"), ("--zone", "Europe/Berlin")):
        assert asked("--format", "focus", *wrong)[0] == 2

    file = tmp_path / "usage.html"
    code, _, params = asked("--html", str(file), "--by", "hour")
    assert (code, params["by"]) == (0, "hour,model") and "No job ended" in file.read_text()
    assert asked("--html", str(file), "--by", "tenant")[0] == 2
    assert asked("--html", str(tmp_path / "none" / "usage.html"))[0] == 1


def test_the_page_draws_each_currency_and_the_time_of_devices(asked: Any, tmp_path: Path) -> None:
    file = tmp_path / "usage.html"
    parts = ("up", "load", "busy", "idle", "waste", "overhead", "open")
    times = [f"2027-01-{day}T00:00:00Z" for day in (30, 31)]
    rows = [row(time, "<m>", currency=currency) for time in times for currency in ("EUR", "USD")]
    rows.append(row(times[0], None, rest=True, currency=None))
    devices = [
        {"time": time, "device": "cpu", "seconds": dict.fromkeys(parts, 7.0) | {"open": -3.0}}
        for time in times
    ]

    asked("--html", str(file), rows=rows, devices=devices)

    page = file.read_text()
    assert page.count("<svg") == 3 and "Cost of jobs in EUR" in page and "(others)" in page
    assert "&lt;m&gt;" in page and "<m>" not in page and "http" not in page.replace("charset", "")


def test_no_data_is_an_empty_table_and_a_label_that_nobody_has_is_said(
    asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = asked("--by", "metadata.custmer")

    assert (code, out) == (0, "")
    said = capsys.readouterr().err
    assert "No job ended between" in said and "has metadata.custmer" in said


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), max_size=5))
def test_csv_comes_back_as_it_went_in_and_runs_nothing_in_a_spreadsheet(
    rows: list[list[str]],
) -> None:
    text = csv_of(["a", "b"], rows)

    back = list(csv.reader(io.StringIO(text, newline="")))[1:]
    assert [[cell.removeprefix("'") for cell in row] for row in back] == [
        [cell.removeprefix("'") for cell in row] for row in rows
    ]
    assert not any(cell[:1] in tuple("=+@\t\r") and cell for row in back for cell in row)
