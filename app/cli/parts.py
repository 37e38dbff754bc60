"""Commands that run Gristmill: all of it, or one part."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from typing import Any, Final, NoReturn

import click

from app.cli.terminal import FAILED, load_settings, out, tell


@click.command()
def up() -> None:
    """Run everything on this machine until Ctrl-C."""
    from app.local.supervisor import System

    with contextlib.suppress(KeyboardInterrupt), _signals_interrupt():
        loaded = load_settings()
        with System(loaded, tell) as system:
            settings = system.settings
            out.print(
                f"[bold]API[/]     {settings.api.url}/docs\n[bold]Flower[/]  {settings.flower.url}",
                markup=True,
            )
            if not settings.api.token:
                out.print(
                    "Every user of this machine can use the API; set GRISTMILL_API__TOKEN to a "
                    "secret of 16 characters or more to keep it for yourself.",
                    soft_wrap=True,
                )
            out.print(
                f"Logs are in {settings.cache_dir}/logs. The servers' URLs, passwords "
                "included: `gristmill config get database.url` and `… broker.url`.\n"
                f"{_how_to_stop()} stops everything.",
                soft_wrap=True,
            )
            system.watch()
    tell("Everything is stopped.")


@click.command()
def demo() -> None:
    """Run real prompts through the whole system, show each one's record, stop."""
    from app.demo.run import run

    with _signals_interrupt():
        run(load_settings(), out, tell)


check_option = click.option(
    "--check", is_flag=True, help="Only tell by the exit code whether one is up here and well."
)


@click.command()
@check_option
def api(check: bool) -> None:
    """Serve the HTTP API."""
    if check:
        from app.local.checks import api_answers

        _answer(api_answers(load_settings().settings))
    from app.api.app import serve

    serve(load_settings().connected())


@click.command()
@click.option("--model", "models", multiple=True, help="Serve this model; may be repeated.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@check_option
def worker(models: tuple[str, ...], device: str | None, check: bool) -> None:
    """Run models: a Celery worker with Gristmill's pool."""
    if check:
        from app.local.checks import worker_answers

        _answer(worker_answers(load_settings().connected()))
    from app.broker.commands import worker_command

    if models:
        os.environ["GRISTMILL_WORKER__MODELS"] = ",".join(models)
    if device:
        os.environ["GRISTMILL_WORKER__DEVICE"] = device
    _become(*worker_command(load_settings().connected()))


@click.command()
@check_option
def rescue(check: bool) -> None:
    """Bring back what was lost: leases that ran out, messages that vanished, deadlines."""
    if check:
        from app.local.checks import rescue_is_alive

        _answer(rescue_is_alive(load_settings().settings))
    from app.rescue import serve
    from app.telemetry import setup_logging

    settings = load_settings().connected()
    setup_logging(settings.log_level)
    serve(settings)


@click.command()
@check_option
def flower(check: bool) -> None:
    """Watch the queue in a browser."""
    if check:
        from app.local.checks import flower_answers

        _answer(flower_answers(load_settings().settings))
    from app.broker.commands import flower_command
    from app.local.ports import require_port

    settings = load_settings().connected()
    command = flower_command(settings)
    require_port(settings.flower.host, settings.flower.port, "Flower")
    _become(*command)


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure: engine, step and more; see `gristmill bench --help`."""
    sys.argv = ["gristmill bench", *arguments]
    runpy.run_module("app.bench", run_name="__main__")


@click.command()
@click.argument("move", type=click.Choice(["up", "down", "check"]), default="up")
@click.option("--to", "revision", help="With down: the revision to go back to; base is nothing.")
@click.option("--yes", is_flag=True, help="With down: do not ask.")
def migrate(move: str, revision: str | None, yes: bool) -> None:
    """Bring the database schema up to date, take it back, or check it."""
    from app.store import database

    url = load_settings().connected().database.url
    if move == "up":
        out.print(f"The schema is at {database.migrate(url)}.")
    elif move == "check":
        with contextlib.closing(database.Database(url)) as connected:
            connected.check_schema()
        out.print("The schema fits.")
    elif revision is None:
        raise click.UsageError("Say how far to go down: --to REVISION.")
    else:
        yes or click.confirm(
            "Columns and tables are dropped with what is in them. Go on?", abort=True
        )
        out.print(f"The schema is at {database.downgrade(url, revision)}.")


def _answer(is_well: bool) -> NoReturn:
    sys.exit(0 if is_well else FAILED)


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Go on as another program in this process, so that signals reach it."""
    os.execve(command[0], command, environment)


def _how_to_stop() -> str:
    """A shell's job in the background does not get Ctrl-C."""
    return "Ctrl-C" if _is_heeded(signal.SIGINT) else f"`kill {os.getpid()}`"


def _is_heeded(number: signal.Signals) -> bool:
    """Whether whoever started us left this signal to us: nohup and shells ignore some for us."""
    return signal.getsignal(number) is not signal.SIG_IGN


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Take SIGTERM and a closed terminal as Ctrl-C, so that everything is stopped in order.

    Under nohup a terminal may be closed.
    """

    def interrupt(number: int, _: object) -> NoReturn:
        tell(f"{signal.Signals(number).name}: everything is being stopped.")
        raise KeyboardInterrupt

    numbers = filter(_is_heeded, (signal.SIGTERM, signal.SIGHUP))
    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, interrupt) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


COMMANDS: Final = (up, demo, api, worker, rescue, flower, bench, migrate)
