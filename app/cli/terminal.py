"""What the commands share: where they print, and how they read the settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.printable import printable

if TYPE_CHECKING:
    from app.config.file import Loaded

_SHORT_WORD: Final = 10
"""A longer one may be cut to keep a table in a terminal's width."""

FAILED, WRONG_SETTINGS, UNAVAILABLE, JOB_FAILED, INTERRUPTED = 1, 3, 4, 5, 130


class PlainConsole(Console):
    """Shows text as it is written: nothing in it acts on the terminal, and there is no markup or
    emoji in it but where `markup=True` says so of our own."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    @property
    def is_terminal(self) -> bool:
        """Whatever the environment says: a pipe is none, so nothing that goes there is coloured."""
        return self.file.isatty()

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


out: Final = PlainConsole()
err: Final = PlainConsole(stderr=True)

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def load_settings() -> Loaded:
    from app.config.file import load

    return load()


def tell(line: str) -> None:
    """Print a line for the person at the terminal, beside the output proper."""
    err.print(line, soft_wrap=True)


def say(text: str, *, goes_on: bool = False) -> None:
    """Print what a model said: as it is into a file or pipe, harmless to a terminal. `goes_on`:
    more of the same line follows."""
    shown = printable(text) if out.is_terminal else text
    click.echo(shown, color=True, nl=not goes_on)  # True: left as it is


def print_row(*cells: object) -> None:
    """Print a line of cells between tabs, for people and programs."""
    click.echo("\t".join(map(_cell, cells)))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table to a terminal, or one row below the other where that is too narrow for it; to a
    file or pipe the rows alone, whole and one a line."""
    if not out.is_terminal:
        for row in rows:
            print_row(*row)
        return
    cells = [list(map(_cell, row)) for row in rows]
    if cells and _least_width([list(columns), *cells]) > out.width:
        for place, row in enumerate(cells):
            if place:
                out.print()
            print_fields(zip(columns, row, strict=True))
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == "id", overflow="fold")
    for row in cells:
        table.add_row(*row)
    out.print(table)


def _least_width(rows: Sequence[Sequence[str]]) -> int:
    """Of a table in which no short word is cut."""
    words = [
        [len(word) for cell in column for word in cell.split()]
        for column in zip(*rows, strict=True)
    ]
    return sum(min(max(column, default=0), _SHORT_WORD) for column in words) + len(words) - 1


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Print names and values, one a line."""
    if not out.is_terminal:
        for name, value in fields:
            print_row(name, value)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(name, _cell(value))
    out.print(table)


def _cell(value: object) -> str:
    """A value on one line and without tabs."""
    return printable(str(value)).replace("\n", r"\n").replace("\t", r"\t")


def print_json(value: Any) -> None:
    """Print one line of JSON, for programs."""
    click.echo(json.dumps(value))
