"""Webhooks: the process that delivers them."""

from __future__ import annotations

import click

from app.cli.parts import check_option, tell_whether_well
from app.cli.terminal import load_settings


@click.group(invoke_without_command=True)
@check_option
@click.pass_context
def hooks(context: click.Context, check: bool) -> None:
    """Deliver webhooks; several may run at once."""
    if context.invoked_subcommand is not None:
        return
    if check:
        from app.local import checks

        tell_whether_well(checks.hooks(load_settings().settings))
    from app.hooks import serve
    from app.telemetry import setup_logging

    settings = load_settings().connected()
    setup_logging(settings.log_level)
    serve(settings)
