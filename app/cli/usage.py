"""What jobs used and cost: as a table, JSON, CSV, FOCUS, or a page with pictures."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import click

from app.books.usage import MAX_TOP, PARTS, SPANS, hour_of, zone_of
from app.cli import focus, usage_page
from app.cli.api import QUICK_S, Api, uses_api
from app.cli.options import NameValue
from app.cli.terminal import out, print_json, print_table, say, tell
from app.errors import RequestError
from app.jobs import MAX_PRIORITY

Answer = Mapping[str, Any]

STATES: Final = ("completed", "failed", "cancelled", "expired")
NUMBERS: Final = (
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "device_seconds",
    "wasted_seconds",
    "cost",
    "currency",
    "cost_per_million_tokens",
    "cost_per_million_tokens_real",
    "charge",
    "energy_joules",
    "energy_method",
    "energy_jobs",
    "wasted_joules",
    "carbon_grams",
    "mean_batch_size",
    "mean_batch_sequences",
    "padding_share",
)
TIMES: Final = {"hour": "%Y-%m-%dT%H:00%z", "day": "%Y-%m-%d", "month": "%Y-%m"}
OF_DEVICES: Final = ("up", *PARTS)
REST: Final = "(others)"
NONE: Final = "(none)"

LEFT_OUT: Final = {"charge", "energy_method", "energy_jobs", "wasted_joules", "carbon_grams"}
"""Of the table in a terminal, which is wide enough."""

_SHORT: Final = {
    "cost_per_million_tokens": "per 1M tokens",
    "cost_per_million_tokens_real": "at real use",
    "mean_batch_size": "batch",
    "mean_batch_sequences": "sequences",
    "padding_share": "padding",
} | {f"jobs_{state}": state for state in STATES}

_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}
_FORMULA: Final = re.compile(r"^[=+\-@\t\r]")


@click.command()
@click.option(
    "--by",
    multiple=True,
    metavar="KEYS",
    help="Groups: hour, day or month; model, tenant, priority, price, metadata.KEY; several with "
    "commas between. None: one sum.",
)
@click.option("--since", help="Ended at or after this full hour: 2027-01-31, 7d, 12h ago. [30d]")
@click.option("--until", help="Ended before this full hour.")
@click.option(
    "--zone",
    default="UTC",
    show_default=True,
    help="Whose days they are, and whose times are given without a zone.",
)
@click.option("--model", help="Of this model.")
@click.option("--tenant", help="Of this tenant.")
@click.option("--priority", type=click.IntRange(0, MAX_PRIORITY), help="Of this priority.")
@click.option(
    "--metadata",
    type=NameValue(),
    multiple=True,
    callback=lambda _context, _option, given: dict(given),
    help="With this among its metadata, as in customer=42; may be repeated.",
)
@click.option(
    "--top",
    type=click.IntRange(1, MAX_TOP),
    default=50,
    show_default=True,
    help="Groups that are told apart; the rest is summed.",
)
@click.option(
    "--devices",
    "of_devices",
    is_flag=True,
    help="Where the time of all devices went, and what it cost, in place of what jobs used.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv", "focus"]),
    default="table",
    show_default=True,
    help="How it is printed. focus: CSV with the columns of FOCUS 1.3, by day or hour.",
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write a page with pictures, by day (or hour, or month) and model.",
)
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
@uses_api
def usage(
    api: Api,
    by: Sequence[str],
    since: str | None,
    until: str | None,
    of_devices: bool,
    form: str,
    html: Path | None,
    **asked: Any,
) -> None:
    """Sum up what jobs used and cost that ended in a period.

    By day and model in February: --by day,model --since 2027-02-01 --until 2027-03-01.
    """
    now = datetime.now(UTC)
    keys = ",".join(by)
    if html or form == "focus":
        keys = _fixed(keys, "model" if html else ",".join(focus.BY))
        asked["top"] = usage_page.TOP if html else MAX_TOP
    if form == "focus" and not html and asked["zone"] != "UTC":
        raise click.UsageError("FOCUS has its times in UTC: leave --zone out.")
    try:
        zone = zone_of(asked["zone"])
        for name, text in (("since", since), ("until", until)):
            if text is not None:
                asked[name] = time_of(text, zone, now)
    except RequestError as error:
        raise click.UsageError(str(error)) from None
    with api.client(QUICK_S) as client:
        answer = client.usage(by=keys, **asked)
    if html:
        html.write_text(_page(answer))
        tell(f"Wrote {html}.")
    else:
        show(answer, form, of_devices)


def _fixed(by: str, keys: str) -> str:
    """The keys of a form that has its own, but for the span of time."""
    if by not in ("", *SPANS):
        raise click.UsageError(f"This is by {keys.replace(',', ', ')}: --by may say hour or day.")
    return f"{by or 'day'},{keys}"


def _page(answer: Answer) -> str:
    span, zone = answer["by"][0], answer["zone"]
    return usage_page.page_of(
        answer,
        [time_shown(row["group"][span], span, zone) for row in answer["data"]],
        [time_shown(row["time"], span, zone) for row in answer["devices"]],
    )


def time_of(text: str, zone: ZoneInfo, now: datetime) -> datetime:
    """A time, or how long ago, to the full hour. Raises `RequestError`."""
    try:
        if off := re.fullmatch(r"(\d{1,9})([mhd])", text):
            return hour_of(now - timedelta(**{_UNITS[off[2]]: int(off[1])}))
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise RequestError(
            f"{text} is neither a time, as in 2027-01-31T12:00, nor how long ago, as in 7d."
        ) from None


def show(answer: Answer, form: str, of_devices: bool) -> None:
    columns, rows = device_columns(answer), device_rows(answer)
    if not of_devices:
        columns, rows = columns_of(answer), rows_of(answer)
    match form:
        case "focus":
            try:
                text = csv_of(focus.COLUMNS, focus.rows_of(answer))
            except ValueError as error:
                raise click.UsageError(str(error)) from None
            say(text.removesuffix("\r\n"))
        case "json":
            print_json(answer)
        case "csv":
            say(csv_of(columns, rows).removesuffix("\r\n"))
        case _:
            kept = [place for place, name in enumerate(columns) if name not in LEFT_OUT]
            shown = [columns[place] for place in kept]
            print_table(
                [_SHORT.get(name, name.replace("_", " ")) for name in shown],
                ([_shown(row[place]) for place in kept] for row in rows),
            )
    if not answer["devices" if of_devices else "data"]:
        what = "No device was up" if of_devices else "No job ended"
        tell(f"{what} between {answer['since']} and {answer['until']}.")
    for key in answer["by"]:
        if key.startswith("metadata.") and not any(row["group"][key] for row in answer["data"]):
            tell(f"No job of this period that is kept has {key}.")


def columns_of(answer: Answer) -> Sequence[str]:
    return (*answer["by"], *(f"jobs_{state}" for state in STATES), *NUMBERS)


def rows_of(answer: Answer) -> Iterator[list[object]]:
    for row in answer["data"]:
        yield [
            *(key_of(row, key, answer["zone"]) for key in answer["by"]),
            *(row["jobs"][state] for state in STATES),
            *(row[name] for name in NUMBERS),
        ]


def device_columns(answer: Answer) -> Sequence[str]:
    spans = [key for key in answer["by"] if key in SPANS]
    parts = (f"{part}_{what}" for what in ("seconds", "cost") for part in OF_DEVICES)
    return (*spans, "device", "price", *parts, "currency")


def device_rows(answer: Answer) -> Iterator[list[object]]:
    for row in answer["devices"]:
        yield [
            *(time_shown(row["time"], key, answer["zone"]) for key in answer["by"] if key in SPANS),
            row["device"],
            row["price_id"],
            *(row["seconds"][part] for part in OF_DEVICES),
            *((row["cost"] or {}).get(part) for part in OF_DEVICES),
            row["currency"],
        ]


def key_of(row: Answer, key: str, zone: str) -> object:
    """A key of a row's group as it is shown: times as they are in their zone."""
    value = row["group"][key]
    if key in TIMES:
        return time_shown(value, key, zone)
    if row["rest"]:
        return REST
    return NONE if value is None else value


def time_shown(time: str, span: str, zone: str) -> str:
    return datetime.fromisoformat(time).astimezone(ZoneInfo(zone)).strftime(TIMES[span])


def csv_of(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """CSV as RFC 4180 has it. What a spreadsheet would run as a formula is text: it begins with an
    apostrophe."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows([_harmless(cell) for cell in row] for row in rows)
    return file.getvalue()


def _harmless(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell


def _is_formula(text: str) -> bool:
    return bool(_FORMULA.match(text)) and not re.fullmatch(r"-?[\d.]+", text)


def _shown(cell: object) -> object:
    """For people no more digits than one reads; for a pipe as it is."""
    if not out.is_terminal:
        return "" if cell is None else cell
    match cell:
        case float():
            return f"{cell:,.3f}".rstrip("0").rstrip(".")
        case int():
            return f"{cell:,}"
        case str() if re.fullmatch(r"\d+\.\d{9}", cell):
            return f"{Decimal(cell).normalize():f}"
        case None:
            return ""
    return cell
