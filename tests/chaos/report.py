"""The report: a line as each fault ends, a table, a page, and a line of JSON at the end."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from app.bench.report import machine, print_json, print_table
from tests.chaos.scene import Outcome

COLUMNS: Final = ("fault", "survived", "jobs", "lost", "doubled", "recovery s", "bound s", "took s")


def print_one(outcome: Outcome) -> None:
    """What happened, as soon as it has."""
    word = f"SKIPPED, {outcome.skipped}" if outcome.skipped else "survived"
    word = "NOT SURVIVED" if outcome.violations else word
    print(
        f"{outcome.number:>2} {outcome.name}: {word}, {outcome.jobs} jobs, recovery "
        f"{outcome.recovery_s:.1f} of {outcome.bound_s:.1f} s, took {outcome.took_s:.0f} s",
        flush=True,
    )
    for text in [*outcome.notes, *outcome.violations[:10]]:
        print(f"     {text}", flush=True)
    if len(outcome.violations) > 10:
        print(f"     … {len(outcome.violations) - 10} more violations", flush=True)


def print_all(outcomes: Sequence[Outcome]) -> None:
    print()
    print_table(COLUMNS, [_cells(outcome) for outcome in outcomes])
    print()
    print_json("chaos", totals(outcomes))


def totals(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return {
        "faults": len(outcomes),
        "survived": sum(outcome.survived for outcome in outcomes),
        "jobs": sum(outcome.jobs for outcome in outcomes),
        "lost": sum(outcome.lost for outcome in outcomes),
        "doubled": sum(outcome.doubled for outcome in outcomes),
    }


def _cells(outcome: Outcome) -> list[str]:
    return [
        f"{outcome.number:>2} {outcome.name}",
        "NO" if outcome.violations else "skipped" if outcome.skipped else "yes",
        f"{outcome.jobs:,}",
        str(outcome.lost),
        str(outcome.doubled),
        f"{outcome.recovery_s:.1f}",
        f"{outcome.bound_s:.1f}",
        f"{outcome.took_s:.0f}",
    ]


_STYLE: Final = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222 }
table { border-collapse: collapse; width: 100% }
td, th { padding: .35rem .6rem; text-align: right; vertical-align: top }
td, th { border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
.no { background: #fde8e8 } .bad { color: #a00; font-size: 13px }
.notes { color: #555; font-size: 13px }
.bar { background: #ddd; height: 6px; width: 8rem; display: inline-block }
.bar b { background: #4a8; height: 6px; display: block } .over b { background: #c33 }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } td, th { border-color: #444 } .notes { color: #aaa }
  .no { background: #402020 } .bad { color: #f99 } .bar { background: #444 }
}
"""


def write_html(outcomes: Sequence[Outcome], file: Path, *, seed: int, commit: str) -> None:
    """One page that needs nothing else."""
    sums = totals(outcomes)
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "".join(_html_row(outcome) for outcome in outcomes)
    file.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Chaos report</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>
<h1>{sums["survived"]} of {sums["faults"]} faults survived</h1>
<p>{sums["jobs"]:,} jobs, {sums["lost"]} lost, {sums["doubled"]} doubled. Seed {seed}, commit
{escape(commit)}, {escape(machine())}.</p>
<p class="notes">Recovery is the time from healing to the end of the last job that was open then.
Its bound is the lease, the sweep, the reload of a model and the run of those jobs.</p>
<table><tr>{head}</tr>{body}</table></html>
"""
    )


def _html_row(outcome: Outcome) -> str:
    first, *others = _cells(outcome)
    details = "".join(f'<div class="notes">{escape(text)}</div>' for text in outcome.notes)
    details += "".join(f'<div class="bad">{escape(text)}</div>' for text in outcome.violations[:20])
    checks = f'<div class="notes">checked: {" ".join(outcome.checks)}</div>'
    share = min(1.0, outcome.recovery_s / outcome.bound_s) if outcome.bound_s else 0.0
    over = " over" if outcome.recovery_s > outcome.bound_s else ""
    bar = f'<div class="bar{over}"><b style="width:{100 * share:.0f}%"></b></div>'
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in others[:4])
    cells += f"<td>{escape(others[4])}<br>{bar}</td>"
    cells += "".join(f"<td>{escape(cell)}</td>" for cell in others[5:])
    mark = "" if outcome.survived else ' class="no"'
    return f"<tr{mark}><td>{escape(first)}{checks}{details}</td>{cells}</tr>"
