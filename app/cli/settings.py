"""Commands about settings, and whether all is well."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any, Final

import click
from rich.markup import escape

from app.cli.terminal import FAILED, as_json_option, load_settings, out, print_json, print_table


@click.group()
def config() -> None:
    """Settings in force, and where each comes from."""


@config.command("show")
@as_json_option
def config_show(as_json: bool) -> None:
    """List every setting with its value and where it was set; passwords are masked."""
    from app.config.file import rows

    found = list(rows(load_settings()))
    if as_json:
        print_json({name: {"value": value, "source": source} for name, value, source in found})
        return
    print_table(("setting", "value", "set by"), found)


@config.command("get")
@click.argument("name")
def config_get(name: str) -> None:
    """Print one setting as it is, passwords included, for use in scripts."""
    value: Any = load_settings().settings.model_dump(mode="json")
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise click.UsageError(f"{name} is not a setting; `gristmill config show` lists all.")
        value = value[part]
    click.echo(value if isinstance(value, str) else json.dumps(value))


@click.command()
@as_json_option
def doctor(as_json: bool) -> None:
    """Check Python, servers, schema, models and device, and say what to do."""
    from app.local.doctor import examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            mark = {True: "[green]ok[/]  ", False: "[red]no[/]  ", None: "[yellow]note[/]"}[
                finding.ok
            ]
            out.print(f"{mark} [bold]{escape(finding.name)}[/]: ", end="", markup=True)
            out.print(finding.detail, soft_wrap=True)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    sys.exit(FAILED if any(finding.ok is False for finding in findings) else 0)


COMMANDS: Final = (config, doctor)
