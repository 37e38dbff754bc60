"""The command that shows where a job's time went, as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil
from typing import Any, Final

import click
from rich.text import Text

from app.books.timeline import Phase, Use
from app.cli.api import Api, uses_api
from app.cli.terminal import as_json_option, out, print_json
from app.jobs import CloseReason
from app.printable import printable

BAR: Final = 40
"""Columns for the whole life of a job."""

NAMED: Final = 3
"""Jobs of a batch that are named; all are with --json."""

LABELS: Final[dict[str, tuple[str, str]]] = {
    Phase.WAITING: ("earlier wait", "yellow"),
    Phase.SCHEDULED: ("not due", "bright_black"),
    Phase.UNSENT: ("not sent", "yellow"),
    Phase.SENT: ("in Redis", "yellow"),
    Phase.HELD: ("in a worker", "yellow"),
    Phase.CLAIMED: ("in a batch", "cyan"),
    Phase.PREFILL: ("prefill", "green"),
    Phase.DECODE: ("decode", "green"),
    Phase.COMMIT: ("commit", "blue"),
    Phase.RUNNING: ("attempt", "cyan"),
    Use.RECOMPUTED: ("recomputed", "yellow"),
    Use.COMPUTED: ("computed", "green"),
    Use.WASTED: ("wasted", "red"),
}


REASONS: Final[dict[str, str]] = {
    CloseReason.SIZE: "it was full",
    CloseReason.TOKENS: "it had as many tokens as it may",
    CloseReason.WAIT: "its oldest job had waited for as long as any does",
    CloseReason.JOIN: "the engine had room",
}


@click.command()
@click.argument("job_id", metavar="ID")
@as_json_option
@uses_api
def explain(api: Api, job_id: str, as_json: bool) -> None:
    """Show what a job waited for and what it took, to the microsecond and the nanosecond."""
    with api.client() as client:
        told = client.timeline(job_id)
    if as_json:
        print_json(told)
        return
    for line in picture(told, "█" if out.encoding.lower().startswith("utf") else "#"):
        out.print(line, soft_wrap=True)


def picture(told: dict[str, Any], block: str) -> Iterator[Text]:
    """A timeline of the API in lines, drawn with this character."""
    yield _line(f"{told['id']}  {told['model']}", style="bold")
    yield _line(told["summary"])
    is_numbered = len(told["attempts"]) > 1
    yield from _spans(told["spans"], told["total_ms"], is_numbered, block)
    for attempt in told["attempts"]:
        yield from _attempt(attempt)
    yield from _device(told["device"], is_numbered)
    yield from map(_line, _facts(told))


def _spans(
    spans: list[dict[str, Any]], total_ms: float, is_numbered: bool, block: str
) -> Iterator[Text]:
    if not spans:
        return
    yield _line("")
    yield _line(f"{'':16}{'ms':>16}{'%':>7}")
    before = 0.0
    for span in spans:
        after = before + span["ms"]
        left = int(BAR * before / total_ms) if total_ms else 0
        right = min(BAR, max(left + 1, ceil(BAR * after / total_ms))) if total_ms else 1
        before = after
        label, style = _label(span["phase"], span["attempt"] if is_numbered else None)
        line = _line(f"{label:16}{span['ms']:>16,.3f}{_percent(span['ms'], total_ms)}  ")
        line.append(" " * min(left, BAR - 1) + block * max(1, right - left), style=style)
        yield line.append("  adjusted" if span["adjusted"] else "")
    yield _line(f"{'total':16}{total_ms:>16,.3f}{_percent(total_ms, total_ms)}")


def _attempt(told: dict[str, Any]) -> Iterator[Text]:
    worker, batch = told["worker"], told["batch"]
    how = f"{told['outcome']} after" if told["outcome"] else "has run for"
    error = f", {told['error_code']}" if told["error_code"] else ""
    yield _line("")
    yield _line(
        f"attempt {told['number']}: {how} {told['ms']:,.3f} ms{error}; "
        f"worker {worker['name'] or worker['id']}"
    )
    if batch["jobs"] is None:
        return
    why = REASONS.get(batch["close_reason"], batch["close_reason"])
    company = "this job alone" if batch["jobs"] == 1 else f"{batch['jobs']} jobs"
    yield _line(
        f"  batch {batch['id']}: {company}, closed because {why}; "
        f"the oldest had waited {batch['wait_ms']:,.3f} ms"
    )
    for mate in batch["mates"][:NAMED]:
        yield _line(f"    with {mate}")
    if more := len(batch["mates"][NAMED:]):
        yield _line(f"    and {more} more of yours")
    if batch["others"]:
        yield _line(f"    and {batch['others']} that are not yours")


def _device(told: dict[str, Any], is_numbered: bool) -> Iterator[Text]:
    if not told["total_ns"]:
        return
    yield _line("")
    knows_energy = any(part["energy_j"] is not None for part in told["parts"])
    joules = f"{'J':>12}" if knows_energy else ""
    yield _line(f"{'device time':16}{'ns':>16}{'%':>7}{'cost':>18}{joules}")
    for part in told["parts"]:
        label, style = _label(part["use"], part["attempt"] if is_numbered else None)
        share = _percent(part["ns"], told["total_ns"])
        cost = "" if part["cost"] is None else part["cost"]
        joules = "" if part["energy_j"] is None else f"{part['energy_j']:>12,.3f}"
        yield _line(f"{label:16}{part['ns']:>16,}{share}{cost:>18}{joules}".rstrip(), style=style)
    yield _line(f"{'total':16}{told['total_ns']:>16,}{_percent(1, 1)}")


def _facts(told: dict[str, Any]) -> Iterable[str]:
    yield ""
    if worker := told["worker"]:
        lost = "" if worker["up"] else ", which is lost"
        yield f"with worker {worker['name'] or worker['id']}{lost}"
    if usage := told["usage"]:
        cached = f" ({usage['cached_tokens']} from the cache)" if usage["cached_tokens"] else ""
        yield f"tokens: {usage['input_tokens']} in{cached}, {usage['output_tokens']} out"
    if (cost := told["cost"]) and cost["currency"]:
        yield f"cost: {cost['amount']} {cost['currency']}, by the price {cost['price_id']}"
        if cost["upstream"]:
            yield f"  of it for servers elsewhere: {cost['upstream']}"
        if cost["charge"]:
            yield f"  by its tariff for tokens: {cost['charge']}"
    if (energy := told["energy"]) and energy["energy_j"] is not None:
        carbon = "" if energy["carbon_g"] is None else f", {energy['carbon_g']:,.6f} g of CO2"
        yield (
            f"energy: {energy['energy_j']:,.3f} J of its answer{carbon}; "
            f"{energy['energy_method']}, of the {energy['energy_boundary']}"
        )
    if error := told["error"]:
        yield f"error: {error['code']}. {error['message']}"
    if told["replay_of"]:
        yield f"runs once more: {told['replay_of']}"
    if told["replayed_by"]:
        yield f"was run once more: {told['replayed_by']}"
    yield from told["notes"]


def _label(word: str, attempt: int | None) -> tuple[str, str]:
    """How a phase or a use is called and coloured; a newer API may have others."""
    label, style = LABELS.get(word, (word, ""))
    return (label if attempt is None else f"{label} {attempt}"), style


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole if whole else 0:>7.1f}"


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)
