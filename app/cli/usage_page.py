"""Usage as a page with pictures: what each day and model cost, and where the devices' time went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from app.books.usage import PARTS
from app.charts import bar_chart, number, page, paragraph, table

TOP: Final = 6
"""Models that have a colour of their own."""

REST: Final = "(others)"
HOUR_S: Final = 3600


def page_of(answer: Mapping[str, Any], times: Sequence[str], of_devices: Sequence[str]) -> str:
    """An HTML page of an answer by a span and model.

    `times` are those of its rows as they are shown, `of_devices` those of its devices.
    """
    parts = [
        paragraph(f"From {answer['since']} until {answer['until']}, by {answer['by'][0]}."),
        *_costs(answer["data"], times),
        *_devices(answer["devices"], of_devices),
    ]
    if not answer["data"]:
        parts.append(paragraph("No job ended in this period."))
    return page("Usage and cost", *parts)


def _costs(rows: Sequence[Mapping[str, Any]], times: Sequence[str]) -> Iterator[str]:
    for currency in sorted({row["currency"] for row in rows if row["currency"]}):
        costs: defaultdict[tuple[str, str], float] = defaultdict(float)
        for row, time in zip(rows, times, strict=True):
            if row["currency"] == currency:
                costs[_model(row), time] += float(row["cost"])
        yield f"<h2>Cost of jobs in {currency}</h2>"
        yield _stacked(costs, f"cost in {currency}")
    if rows:
        yield "<h2>Models</h2>"
        yield table(
            ("model", "currency", "jobs", "input tokens", "of these cached", "output tokens",
             "device hours", "cost"),
            _models(rows),
        )  # fmt: skip


def _devices(rows: Sequence[Mapping[str, Any]], times: Sequence[str]) -> Iterator[str]:
    hours: defaultdict[tuple[str, str], float] = defaultdict(float)
    for row, time in zip(rows, times, strict=True):
        for part in PARTS:  # what is open is settled later, and may be less than nothing
            hours[part, time] += max(0.0, row["seconds"][part]) / HOUR_S
    if rows:
        yield "<h2>Where the time of devices went</h2>"
        yield _stacked(hours, "hours")
        sums = {part: sum(row["seconds"][part] for row in rows) for part in ("up", *PARTS)}
        shares = [number(100 * sums[part] / (sums["up"] or 1)) for part in PARTS]
        yield table(("of the time up", *PARTS), [["%", *shares]])


def _stacked(values: Mapping[tuple[str, str], float], y: str) -> str:
    """Bars by time of (name, time)."""
    times = sorted({time for _, time in values})
    names = list(dict.fromkeys(name for name, _ in values))
    return bar_chart(
        times, [(name, [values.get((name, time), 0.0) for time in times]) for name in names], y
    )


def _models(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    names = ("input_tokens", "cached_tokens", "output_tokens", "device_seconds", "cost")
    sums: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 6)
    for row in rows:
        found = sums[_model(row), row["currency"] or ""]
        found[0] += sum(row["jobs"].values())
        for place, name in enumerate(names, start=1):
            found[place] += float(row[name]) / (HOUR_S if name == "device_seconds" else 1)
    for (model, currency), found in sums.items():
        *counts, hours, cost = found
        yield [model, currency, *(f"{count:,.0f}" for count in counts), number(hours), number(cost)]


def _model(row: Mapping[str, Any]) -> str:
    return REST if row["rest"] else row["group"]["model"] or "(none)"
