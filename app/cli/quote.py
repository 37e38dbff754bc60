"""`gristmill submit --dry-run`: what jobs would meet, without submitting them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from app.cli.api import LASTING_S, Api
from app.cli.terminal import FAILED, print_fields, print_json, print_table, tell
from gristmill_client import Submission
from gristmill_client.errors import GristmillError

Line = tuple[int, Submission | GristmillError]
"""A line of a file with its number: a job, or why it is none."""


def quote_one(api: Api, submission: Submission, as_json: bool) -> int:
    """Print the quote of one job; the exit code."""
    options = {name: value for name, value in submission.items() if name != "body"}
    with api.client() as client:
        told = client.quote(submission["body"], **options)  # type: ignore[arg-type]
    if as_json:
        print_json(told)
    else:
        print_fields(_fields(told))
    return 0


def quote_many(api: Api, lines: Sequence[Line], as_json: bool) -> int:
    """Print a quote for each line, and what all of them would meet together; the exit code."""
    jobs = [job for _, job in lines if not isinstance(job, GristmillError)]
    told: dict[str, Any] = {"items": [], "costs": [], "finish": None}
    if jobs:
        with api.client(LASTING_S) as client:
            told = client.quote_many(jobs)
    items = iter(told["items"])
    rows, refused = [], 0
    for number, job in lines:
        is_none = isinstance(job, GristmillError)
        item: dict[str, Any] = {"error": {"detail": str(job)}} if is_none else next(items)
        if as_json:
            print_json({"line": number} | item)
        elif quote := item.get("quote"):
            rows.append(
                (number, quote["position"], _time(quote["finish"]), _costs([quote["cost"]]))
            )
        if error := item.get("error"):
            refused += 1
            tell(f"line {number}: would be refused: {error['detail']}")
    if not as_json:
        print_table(("line", "position", "finish p50 / p90", "cost"), rows)
    tell(f"All: finish {_time(told['finish'])}, cost {_costs(told['costs'])}.")
    return FAILED if refused else 0


def _fields(quote: dict[str, Any]) -> Iterator[tuple[str, str]]:
    tokens = quote["tokens"]
    yield "model", quote["model"]
    yield "tokens", f"{tokens['input_tokens']} in, {tokens['max_output_tokens']} out at most"
    if quote["position"] is not None:
        yield "position", str(quote["position"])
    yield "start", _time(quote["start"])
    yield "finish", _time(quote["finish"])
    if quote["reason"]:
        yield "unknown", f"{quote['reason']}: {REASONS.get(quote['reason'], '')}"
    if quote["load_s"] is not None:
        yield "load", f"{quote['load_s']:.0f} s, before a worker is up"
    if quote["deadline_outlook"]:
        yield "deadline", f"{quote['deadline']} {quote['deadline_outlook']}"
    yield "cost", _costs([quote["cost"]])
    if quote["known_as"]:
        yield "known as", quote["known_as"]


REASONS = {
    "no_worker": "no worker that serves the model is up",
    "loading": "a worker loads the model, which takes nobody knows how long yet",
    "no_history": "no job of the model has ended yet",
    "not_looked": "the queue could not be looked at lately",
}


def _time(expected: dict[str, str] | None) -> str:
    return f"{expected['p50']} / {expected['p90']}" if expected else "unknown"


def _costs(costs: Sequence[dict[str, Any] | None]) -> str:
    told = [
        f"{part['low']}–{part['high']} {cost['currency']}{of}"
        for cost in costs
        if cost
        for part, of in ((cost["amount"], ""), (cost["charge"], " by tokens"))
        if part
    ]
    return ", ".join(told) or "unknown"
