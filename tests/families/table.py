"""The tables of models in docs/models.md, and the one that sums them up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.families.broken import BROKEN
from tests.families.catalogue import DECODERS, ENCODER_DECODERS, ENCODERS
from tests.families.trial import Outcome, Result

PAGE: Final = Path(__file__).parents[2] / "docs" / "models.md"

COLUMNS: Final = {
    "decoders": ("decoder", "`inflight`", "`generate`"),
    "encoder-decoders": ("encoder-decoder", "`generate`"),
    "encoders": ("encoder", "embedding", "classification"),
    "broken folders": ("refused, and told why",),
}
NAMES: Final = {
    "decoders": [family.name for family in DECODERS],
    "encoder-decoders": [family.name for family in ENCODER_DECODERS],
    "encoders": [family.name for family in ENCODERS],
    "broken folders": [broken.name for broken in BROKEN],
}
_REAL: Final = {
    ("decoders", "llama"): "SmolLM2-135M-Instruct",
    ("encoders", "bert"): "all-MiniLM-L6-v2",
}
"""Families of which a trained model is tried, too, by the tests of the whole system."""

_AROUND: Final = re.compile(
    r"^The engine \w+ cannot run this model: (?P<why>.*?)\.(?: Use engine generate\.)?$"
)


@dataclass(frozen=True)
class Row:
    title: str  #: of the table
    family: str
    outcomes: Sequence[Outcome] = ()

    @property
    def line(self) -> str:
        real = _REAL.get((self.title, self.family))
        cells = [f"{self.family}, also as {real}" if real else self.family]
        return f"| {' | '.join([*cells, *map(_shown, self.outcomes)])} |"


def updated(page: str, rows: Iterable[Row]) -> str:
    """The page with these rows anew in their tables, and those of broken folders."""
    rows = [*rows, *(Row("broken folders", name) for name in NAMES["broken folders"])]
    for title, columns in COLUMNS.items():
        known = {name_of(line): line for line in lines_of(page, title)}
        known |= {row.family: row.line for row in rows if row.title == title}
        head = f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"
        lines = [*head, *(known[name] for name in NAMES[title] if name in known)]
        before, _, after = _cut(page, title)
        page = before + "".join(f"{line}\n" for line in lines) + after
    return page


def summed_up(page: str) -> str:
    """The page with the numbers of its tables anew."""
    lines = ["| | families | as transformers | of these not padded at will | refused by name |"]
    lines += ["|---|---|---|---|---|"]
    for title, columns in COLUMNS.items():
        cells = [line.split("|")[2:-1] for line in lines_of(page, title)]
        for column, name in enumerate(columns[1:]):
            shown = [row[column].strip() for row in cells]
            equal = [each for each in shown if each.startswith(Result.EQUAL.value)]
            apart = [each for each in equal if each != Result.EQUAL.value]
            refused = [each for each in shown if each.startswith(Result.REFUSED.value)]
            tried = len(equal) + len(refused)
            numbers = f"{tried} | {len(equal)} | {len(apart)} | {len(refused)}"
            lines.append(f"| {title}, {name} | {numbers} |")
    broken = len(lines_of(page, "broken folders"))
    lines.append(f"| kinds of broken folders | {broken} | | | {broken} |")
    before, _, after = _cut(page, "models")
    return before + "".join(f"{line}\n" for line in lines) + after


def lines_of(page: str, title: str) -> list[str]:
    """The lines of a table in the page, but for its head."""
    return _cut(page, title)[1].splitlines()[2:]


def name_of(line: str) -> str:
    """The family that a line is about."""
    return line.split("|")[1].strip().partition(", also as ")[0]


def _cut(page: str, title: str) -> tuple[str, str, str]:
    """What comes before the table, the table, and what comes behind it."""
    begin, end = f"<!-- table: {title} -->\n", f"<!-- end: {title} -->"
    before, _, rest = page.partition(begin)
    table, _, after = rest.partition(end)
    return before + begin, table, end + after


def _shown(outcome: Outcome) -> str:
    if outcome.result is Result.REFUSED:
        around = _AROUND.match(outcome.note)
        return f"refused: {around['why'] if around else outcome.note}"
    return f"{outcome.result.value}; {outcome.note}" if outcome.note else outcome.result.value
