"""The command `gristmill`. Thin: each command hands over to the module that does the work.

Exit codes: 0 done · 1 failed, or some of it was refused · 2 wrong usage · 3 wrong settings or
schema · 4 a service cannot be reached or is full: come again · 5 a job has no answer: it failed,
expired or was cancelled · 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from app.cli import (
    audit,
    batch,
    compare,
    explain,
    hooks,
    jobs,
    keys,
    machine,
    parts,
    results,
    settings,
    submit,
    tenants,
    tune,
    usage,
    verify,
)
from app.cli.terminal import FAILED, INTERRUPTED, JOB_FAILED, UNAVAILABLE, WRONG_SETTINGS, tell
from app.errors import ConfigError, GristmillError, QueueFull, SchemaError, Unavailable
from gristmill_client import JobFailed
from gristmill_client import errors as answered


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
    except (GristmillError, answered.GristmillError, TimeoutError) as error:
        tell(f"gristmill: {error}")
        code = _exit_code(error)
    except OSError as error:  # a full disk, a folder that is not ours
        tell(f"gristmill: {error.filename or 'the system'}: {error.strerror or error}.")
        code = FAILED
    sys.exit(code)


def _exit_code(error: Exception) -> int:
    codes: dict[type[Exception], int] = {
        ConfigError: WRONG_SETTINGS,
        SchemaError: WRONG_SETTINGS,
        Unavailable: UNAVAILABLE,
        QueueFull: UNAVAILABLE,
        answered.Unavailable: UNAVAILABLE,
        answered.QueueFull: UNAVAILABLE,
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


for command in (
    *machine.COMMANDS,
    *parts.COMMANDS,
    hooks.hooks,
    submit.submit,
    results.results,
    batch.batch,
    *jobs.COMMANDS,
    usage.usage,
    audit.audit,
    explain.explain,
    keys.keys,
    tenants.tenants,
    *settings.COMMANDS,
    *verify.COMMANDS,
    *compare.COMMANDS,
    tune.tune,
):
    cli.add_command(command)
