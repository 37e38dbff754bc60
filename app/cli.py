"""The command `gristmill`. Thin: each command hands over to the module that does the work.

Exit codes: 0 done · 1 failed · 2 wrong usage · 3 wrong settings or schema · 4 a service cannot be
reached · 5 the job failed, expired or was cancelled · 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from app.errors import ConfigError, GristmillError, SchemaError, Unavailable

if TYPE_CHECKING:
    from app.client import Client, Job
    from app.config_file import Loaded

FAILED, WRONG_SETTINGS, UNAVAILABLE, JOB_FAILED, INTERRUPTED = 1, 3, 4, 5, 130

out: Final = Console(highlight=False)
err: Final = Console(stderr=True, highlight=False)

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit. An error of ours is one clear line, never a traceback."""
    try:
        code = cli.main(args=arguments, prog_name="gristmill", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except (GristmillError, TimeoutError) as error:
        err.print(f"gristmill: {error}", markup=False, soft_wrap=True)
        code = _exit_code(error)
    sys.exit(code)


def _exit_code(error: Exception) -> int:
    from app.client import JobFailed

    codes: dict[type[Exception], int] = {
        ConfigError: WRONG_SETTINGS,
        SchemaError: WRONG_SETTINGS,
        Unavailable: UNAVAILABLE,
        JobFailed: JOB_FAILED,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), FAILED)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gristmill")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Settings file; else GRISTMILL_CONFIG, else configs/default.toml.",
)
def cli(config: Path | None) -> None:
    """Many prompts through few GPUs, nothing lost, and a bill that adds up."""
    if config is not None:
        os.environ["GRISTMILL_CONFIG"] = str(config.absolute())


def _load() -> Loaded:
    from app.config_file import load

    return load()


# ── running ─────────────────────────────────────────────────────────────────────────────────────


@cli.command()
def up() -> None:
    """Run everything on this machine until Ctrl-C."""
    from app.supervisor import System

    with contextlib.suppress(KeyboardInterrupt), _sigterm_interrupts():
        loaded = _load()
        with System(loaded, _tell) as system:
            settings = system.settings
            out.print(
                f"[bold]API[/]     {settings.api.url}/docs\n[bold]Flower[/]  {settings.flower.url}"
            )
            out.print(
                f"Logs are in {settings.cache_dir}/logs. The servers' URLs, passwords "
                "included: `gristmill config get database.url` and `… broker.url`.\n"
                "Ctrl-C stops everything.",
                soft_wrap=True,
            )
            system.watch()
    _tell("Everything is stopped.")


@cli.command()
def demo() -> None:
    """Run real prompts through the whole system, show each one's record, stop."""
    from app.demo import run

    with _sigterm_interrupts():
        run(_load(), out, _tell)


@cli.command()
def api() -> None:
    """Serve the HTTP API."""
    from app.api.app import serve

    serve(_load().connected())


@cli.command()
@click.option("--model", "models", multiple=True, help="Serve this model; may be repeated.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
def worker(models: tuple[str, ...], device: str | None) -> None:
    """Run models: a Celery worker with Gristmill's pool."""
    from app.broker import worker_command

    if models:
        os.environ["GRISTMILL_WORKER__MODELS"] = ",".join(models)
    if device:
        os.environ["GRISTMILL_WORKER__DEVICE"] = device
    _become(*worker_command(_load().connected()))


@cli.command()
@click.option("--check", is_flag=True, help="Only tell by the exit code whether one is alive.")
def rescue(check: bool) -> None:
    """Bring back what was lost: leases that ran out, messages that vanished, deadlines."""
    from app import rescue as rescue_process

    if check:
        sys.exit(0 if rescue_process.is_alive(_load().settings) else FAILED)
    rescue_process.serve(_load().connected())


@cli.command()
def flower() -> None:
    """Watch the queue in a browser."""
    from app.broker import flower_command

    _become(*flower_command(_load().connected()))


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure: engine, step and more; see `gristmill bench --help`."""
    sys.argv = ["gristmill bench", *arguments]
    runpy.run_module("app.bench", run_name="__main__")


@cli.command()
@click.argument("move", type=click.Choice(["up", "down", "check"]), default="up")
@click.option("--to", "revision", help="With down: the revision to go back to; base is nothing.")
@click.option("--yes", is_flag=True, help="With down: do not ask.")
def migrate(move: str, revision: str | None, yes: bool) -> None:
    """Bring the database schema up to date, take it back, or check it."""
    from app.store import database

    url = _load().connected().database.url
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


# ── jobs ────────────────────────────────────────────────────────────────────────────────────────


@cli.command()
@click.argument("text", required=False)
@click.option(
    "--as",
    "field",
    type=click.Choice(["messages", "prompt", "input"]),
    default="messages",
    help="A chat, a text to go on with, or a text to embed.",
)
@click.option("--model", help="A configured model; else the default one.")
@click.option("--set", "given", multiple=True, metavar="NAME=VALUE", help="As in max_tokens=64.")
@click.option(
    "--file", type=click.File(), help="Request bodies, one JSON object a line; - is stdin."
)
@click.option("--wait", is_flag=True, help="Wait for the answers; exit code 5 if a job fails.")
@as_json_option
def submit(
    text: str | None,
    field: str,
    model: str | None,
    given: tuple[str, ...],
    file: Any,
    wait: bool,
    as_json: bool,
) -> None:
    """Submit TEXT as a job, or every line of a file."""
    if (text is None) == (file is None):
        raise click.UsageError("Give a text or --file, and not both.")
    if file is None:
        content = [{"role": "user", "content": text}] if field == "messages" else text
        bodies = [{field: content}]
    else:
        bodies = [
            _json(line, f"line {number}") for number, line in enumerate(file, 1) if line.strip()
        ]
    settings = dict(_setting(each) for each in given) | ({"model": model} if model else {})
    with _client() as client:
        outcomes = client.submit_many([{"body": body | settings} for body in bodies])
        if len(outcomes) == 1 and isinstance(outcomes[0], GristmillError):
            raise outcomes[0]
        refused = [outcome for outcome in outcomes if isinstance(outcome, GristmillError)]
        for outcome in outcomes:
            if not wait and not isinstance(outcome, GristmillError):
                print_json({"id": outcome}) if as_json else out.print(outcome)
        for error in refused:
            err.print(f"refused: {error.message}", markup=False)
        ids = [outcome for outcome in outcomes if not isinstance(outcome, GristmillError)]
        all_completed = not wait or _wait_for(client, ids, as_json)
    sys.exit(FAILED if refused else 0 if all_completed else JOB_FAILED)


def _wait_for(client: Client, ids: Sequence[str], as_json: bool) -> bool:
    """Show each job as it ends, in the order given; True if all completed."""
    all_completed = True
    with Progress(console=err, transient=True, disable=len(ids) < 2) as progress:
        for job_id in progress.track(ids, description="Waiting"):
            job = client.wait(job_id)
            all_completed &= job.state.value == "completed"
            _show(job, as_json)
    return all_completed


@cli.command()
@click.argument("job_id")
@click.option("--wait", is_flag=True, help="Wait until it has ended; exit code 5 if it failed.")
@as_json_option
def status(job_id: str, wait: bool, as_json: bool) -> None:
    """Show a job: state, timing, cost and answer."""
    with _client() as client:
        job = client.wait(job_id) if wait else client.job(job_id)
    _show(job, as_json)
    sys.exit(JOB_FAILED if job.state.is_final and job.state.value != "completed" else 0)


@cli.command()
@click.argument("job_id")
@as_json_option
def cancel(job_id: str, as_json: bool) -> None:
    """Cancel a job: at once if it is queued; if it runs, its place is freed at the next step."""
    with _client() as client:
        _show(client.cancel(job_id), as_json)


def _show(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job.raw)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    raw = job.raw
    for name in ("id", "state", "model", "batch", "timing", "usage", "cost", "error"):
        value = raw.get(name)
        if isinstance(value, dict):
            value = "  ".join(f"{key} {part}" for key, part in value.items() if part is not None)
        if value is not None:
            table.add_row(name, str(value))
    out.print(table)
    for text in _texts(job.response or {}):
        out.print(text, markup=False, soft_wrap=True)


def _texts(response: dict[str, Any]) -> Iterator[str]:
    """What a response says: the text of each choice, or the size of each vector."""
    for choice in response.get("choices", ()):
        yield choice["message"]["content"] if "message" in choice else choice["text"]
    for item in response.get("data", ()):
        yield f"a vector of {len(item['embedding'])} numbers"


# ── settings ────────────────────────────────────────────────────────────────────────────────────


@cli.group()
def config() -> None:
    """Settings in force, and where each comes from."""


@config.command("show")
@as_json_option
def config_show(as_json: bool) -> None:
    """List every setting with its value and where it was set; passwords are masked."""
    from app.config_file import rows

    found = list(rows(_load()))
    if as_json:
        print_json({name: {"value": value, "source": source} for name, value, source in found})
        return
    table = Table("setting", "value", "set by", box=None, pad_edge=False)
    for name, value, source in found:
        table.add_row(name, str(value), source)
    out.print(table)


@config.command("get")
@click.argument("name")
def config_get(name: str) -> None:
    """Print one setting as it is, passwords included, for use in scripts."""
    value: Any = _load().settings.model_dump(mode="json")
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise click.UsageError(f"{name} is not a setting; `gristmill config show` lists all.")
        value = value[part]
    click.echo(value if isinstance(value, str) else json.dumps(value))


@cli.command()
@as_json_option
def doctor(as_json: bool) -> None:
    """Check Python, servers, schema, models and device, and say what to do."""
    from app.doctor import examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            mark = {True: "[green]ok[/]  ", False: "[red]no[/]  ", None: "[yellow]note[/]"}[
                finding.ok
            ]
            out.print(f"{mark} [bold]{finding.name}[/]: ", end="")
            out.print(finding.detail, markup=False, soft_wrap=True)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    sys.exit(FAILED if any(finding.ok is False for finding in findings) else 0)


# ── small things ────────────────────────────────────────────────────────────────────────────────


def _tell(line: str) -> None:
    err.print(line, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One line of JSON, for programs."""
    click.echo(json.dumps(value))


def _client() -> Client:
    from app.client import Client

    return Client(_load().settings.api.url, max_retries=2)


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.UsageError(f"{where} is not a JSON object.")
    return value


def _setting(text: str) -> tuple[str, Any]:
    """`max_tokens=64` as a name and a JSON value; what is not JSON is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set {text}: give NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Go on as another program in this process, so that signals reach it."""
    os.execve(command[0], command, os.environ | environment)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Take SIGTERM and a closed terminal as Ctrl-C, so that everything is stopped in order."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, interrupt) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
