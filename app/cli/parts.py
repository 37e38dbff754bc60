"""Commands that run one part of Gristmill, or a demonstration of all."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from typing import TYPE_CHECKING, Final, NoReturn

import click

from app.cli.interrupts import signals_interrupt
from app.cli.terminal import FAILED, load_settings, out, tell

if TYPE_CHECKING:
    from app.local.upkeep import Answer


@click.command()
def demo() -> None:
    """Run real prompts through the whole system, show each one's record, stop."""
    from app.demo.run import run

    with signals_interrupt(tell):
        run(load_settings(), out, tell)


check_option = click.option(
    "--check", is_flag=True, help="Only tell by the exit code whether one is up here and well."
)


@click.command()
@check_option
def api(check: bool) -> None:
    """Serve the HTTP API."""
    if check:
        from app.local import checks

        tell_whether_well(checks.api(load_settings().settings))
    from app.api.app import serve

    serve(load_settings().connected())


@click.command()
@click.option("--model", "models", multiple=True, help="Serve this model; may be repeated.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@check_option
def worker(models: tuple[str, ...], device: str | None, check: bool) -> None:
    """Run models: a Celery worker with Gristmill's pool."""
    if check:
        from app.local import checks

        tell_whether_well(checks.worker(load_settings().connected()))
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
        from app.local import checks

        tell_whether_well(checks.rescue(load_settings().settings))
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
        from app.local import checks

        tell_whether_well(checks.flower(load_settings().settings))
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
    from app.store import migration, prices
    from app.store.database import Database

    settings = load_settings().connected()
    url = settings.database.url
    if move == "up":
        out.print(f"The schema is at {migration.migrate(url)}.")
        prices.keep_at(url, settings.prices)
    elif move == "check":
        with contextlib.closing(Database(url)) as connected:
            connected.check_schema()
        out.print("The schema fits.")
    elif revision is None:
        raise click.UsageError("Say how far to go down: --to REVISION.")
    else:
        yes or click.confirm(
            "Columns and tables are dropped with what is in them. Go on?", abort=True
        )
        out.print(f"The schema is at {migration.downgrade(url, revision)}.")


def tell_whether_well(answer: Answer | None) -> NoReturn:
    """By the exit code."""
    from app.local.upkeep import Answer

    sys.exit(0 if answer is Answer.READY else FAILED)


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Go on as another program in this process, so that signals reach it."""
    os.execve(command[0], command, environment)


COMMANDS: Final = (demo, api, worker, rescue, flower, bench, migrate)
