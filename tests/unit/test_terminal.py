"""What others wrote is shown on a terminal, and does nothing to it."""

from __future__ import annotations

import io
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import ConsoleDimensions
from rich.table import Table

from app.cli import terminal
from app.printable import printable
from app.telemetry import TextFormatter

ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
HOSTILE = st.text(
    st.one_of(
        st.sampled_from("\x1b\x9b\x07\r\x08\x0b[]:\\;mHJ\u202e\u2066\ud800ab\n\t "),
        st.characters(exclude_categories=()),
    )
)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_by(console: terminal.PlainConsole, *things: object) -> str:
    console.file = Screen()
    console.print(*things, soft_wrap=True, style="bold")
    text = console.file.getvalue()
    return re.sub(r"\x1b\[[0-9;]*m", "", text, count=text.count("\x1b"))


@given(HOSTILE)
def test_no_text_acts_on_a_terminal(text: str) -> None:
    harmless = printable(text)

    assert not ACTS.search(harmless)
    harmless.encode()
    if not ACTS.search(text) and text.isprintable():
        assert harmless == text


@pytest.mark.parametrize(
    "text",
    [
        "\x1b]52;c;cm0gLXJmIC8=\x07",  # fills the clipboard
        "\x1b[2J\x1b[1;1Hgristmill: all is well",  # clears the screen and writes anew
        "refused\rcompleted",  # writes over
        "\x9b31mred",  # a command in one character
        "[bold red]completed[/] [link=file:///etc/passwd]here[/link] :warning:",  # rich's own
    ],
)
def test_output_and_errors_are_printed_without_escape_sequences_and_markup(text: str) -> None:
    table = Table(box=None)
    table.add_column()
    table.add_row(text)

    for thing in (text, table):
        shown = shown_by(terminal.PlainConsole(), thing)

        assert printable(text) in shown
        assert not ACTS.search(shown)


def test_a_models_answer_is_harmless_on_a_terminal_and_itself_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = "\x1b[2Jgood [b]morning[/b] :smile:\r\n"
    for stream, expected in ((Screen(), printable(answer)), (io.StringIO(), answer)):
        monkeypatch.setattr("sys.stdout", stream)

        terminal.say(answer)

        assert stream.getvalue() == f"{expected}\n"


def test_a_line_of_the_log_does_not_act_on_the_terminal_that_shows_it() -> None:
    record = logging.makeLogRecord({"msg": "Unknown task %s.", "args": ("\x1b[2Jevil",)})

    assert TextFormatter().format(record).endswith(r"Unknown task \x1b[2Jevil.")


def test_a_table_too_wide_for_the_terminal_is_printed_one_row_below_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = [f"column{number:02}" for number in range(12)]

    def printed(width: int) -> list[str]:
        screen, console = Screen(), terminal.PlainConsole()
        console.file, console.size = screen, ConsoleDimensions(width, 25)  # whatever TERM is
        monkeypatch.setattr(terminal, "out", console)
        terminal.print_table(columns, [range(12), range(12, 24)])
        return re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()

    wide, narrow = printed(200), printed(60)

    assert len(wide) == 3
    assert narrow[0].split() == ["column00", "0"]
    assert narrow[12].strip() == ""
    assert narrow[-1].split() == ["column11", "23"]
    assert len(narrow) == 12 + 1 + 12
