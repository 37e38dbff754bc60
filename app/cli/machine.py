"""Commands for everything on this machine: start it, stop it, see what it says."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Final

import click

from app.cli.interrupts import how_to_stop, signals_interrupt
from app.cli.terminal import load_settings, out, say, tell

if TYPE_CHECKING:
    from app.config.settings import Settings

LOOK_S: Final = 0.2


@click.command()
@click.option("--detach", "-d", is_flag=True, help="Return once all is ready; it goes on.")
@click.option("--ready-fd", type=int, hidden=True)
def up(detach: bool, ready_fd: int | None) -> None:
    """Run everything on this machine until Ctrl-C, or `gristmill down`."""
    if detach:
        _detach()
        return
    from app.local.detached import say_ready
    from app.local.supervisor import System

    say = tell if ready_fd is None else _tell_when
    with (
        contextlib.suppress(KeyboardInterrupt),
        signals_interrupt(say),
        System(load_settings(), say) as system,
    ):
        if ready_fd is None:
            _show(system.settings, f"{how_to_stop()} stops everything.")
        else:
            say_ready(ready_fd)
        system.watch()
    say("Everything is stopped.")


def _detach() -> None:
    from app.config.file import cache_dir
    from app.local import detached

    load_settings()  # says what is wrong with them
    command = [sys.executable, "-m", "app.cli", "up"]
    with signals_interrupt(tell):
        code = detached.start(command, cache_dir(), tell)
    if code:
        sys.exit(code)
    _show(
        load_settings().settings,
        "`gristmill logs -f` shows what it does; `gristmill down` stops everything.",
    )


def _show(settings: Settings, how_it_stops: str) -> None:
    """Where all is."""
    out.print(
        f"[bold]API[/]     {settings.api.url}/docs\n[bold]Flower[/]  {settings.flower.url}",
        markup=True,
    )
    if not _needs_keys(settings):
        out.print(
            "Every user of this machine can use the API, until `gristmill keys create` makes the "
            "first key: from then on a call needs one.",
            soft_wrap=True,
        )
    out.print(
        f"Logs are in {settings.cache_dir}/logs. The servers' URLs, passwords included: "
        f"`gristmill config get database.url` and `… broker.url`.\n{how_it_stops}",
        soft_wrap=True,
    )


def _needs_keys(settings: Settings) -> bool:
    from app.store import keys
    from app.store.database import Database

    with (
        contextlib.closing(Database(settings.database.url, pool_size=1)) as database,
        database.begin() as connection,
    ):
        return keys.any_made(connection)


def _tell_when(line: str) -> None:
    """Into a file that is read later."""
    from app.local.detached import TIME

    tell(time.strftime(TIME, time.gmtime()) + line)


@click.command()
def down() -> None:
    """Stop what `gristmill up` runs here, and wait until it is gone."""
    from app.config.file import cache_dir
    from app.local import detached

    folder = cache_dir()
    process = detached.stop(folder)
    if process is None:
        tell(f"Nothing runs in {folder}.")
    else:
        tell(f"Everything is stopped (process {process}).")


@click.command()
@click.argument("parts", nargs=-1, metavar="[PART]...")
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option(
    "--lines",
    "-n",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Last lines to show.",
)
def logs(parts: tuple[str, ...], follow: bool, lines: int) -> None:
    """Show what the parts log: api, worker, rescue, hooks, flower, postgres, redis, or all.

    `up` is the log of `gristmill up --detach`. Logs stay when what wrote them has ended.
    """
    from app.config.file import cache_dir
    from app.local.logs import Log, parts_of

    folder = cache_dir() / "logs"
    known = parts_of(folder)
    if unknown := set(parts) - set(known):
        there = ", ".join(known) or "none yet; `gristmill up` makes them"
        raise click.UsageError(
            f"There is no log of {', '.join(sorted(unknown))} in {folder}. There are: {there}."
        )
    shown = {part: Log(folder / f"{part}.log") for part in parts or known}
    width = max(map(len, shown), default=0) if len(shown) > 1 else None
    for part, log in shown.items():
        for line in log.last_lines(lines):
            _say(part, line, width)
    while follow:
        time.sleep(LOOK_S)
        for part, log in shown.items():
            for line in log.new_lines():
                _say(part, line, width)


def _say(part: str, line: bytes, width: int | None) -> None:
    """With the part's name in front, where there are several."""
    text = line.decode(errors="replace")
    say(text if width is None else f"{part:{width}} | {text}")


COMMANDS: Final = (up, down, logs)
