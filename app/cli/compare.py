"""`gristmill compare`: two models, or one in two ways, over the same prompts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from app.cli.interrupts import signals_interrupt
from app.cli.prompts import limit_option, prompts_option, questions_of, tokens_option
from app.cli.terminal import as_json_option, load_settings, out, print_json, print_table, tell
from app.errors import ConfigError, GristmillError, RequestError
from app.trials.agreement import MEASURES, shown_figure

if TYPE_CHECKING:
    from app.config.settings import Settings
    from app.store.comparisons import NewComparison, StoredComparison
    from app.trials.compare import Comparison

MAX_EARLIER: Final = 20
MAX_RATE: Final = 100_000
_SPEEDS: Final = ("a, tokens/s", "b, tokens/s", "b over a")


class Rate(click.FloatRange):
    """A number: of NaN click finds no end passed."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found: float = super().convert(value, param, ctx)
        if math.isnan(found):
            raise click.BadParameter("nan is no number.", ctx, param)
        return found


@click.command()
@click.argument("a", required=False)
@click.argument("b", required=False)
@prompts_option
@limit_option
@tokens_option
@click.option(
    "--rounds",
    type=click.IntRange(1, 50),
    default=2,
    show_default=True,
    help="How often each runs all prompts; they take turns, A B B A.",
)
@click.option(
    "--rate",
    type=Rate(0, MAX_RATE, min_open=True),
    help="Prompts a second, at times drawn once for all; all at once if left out.",
)
@click.option(
    "--html", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write a page."
)
@click.option("--history", is_flag=True, help="Show earlier comparisons, of A and B or of all.")
@as_json_option
def compare(
    a: str | None,
    b: str | None,
    file: Any,
    limit: int | None,
    tokens: int,
    rounds: int,
    rate: float | None,
    html: Path | None,
    history: bool,
    as_json: bool,
) -> None:
    """Run A and B in turns: agreement, speed, waits, cost, energy, memory.

    Each is a configured model, with other settings behind it if it is to be tried with these:
    smollm2-135m-instruct:dtype=float32. What was measured is kept in Postgres, if there is one.
    """
    if history:
        _history(a, b, limit or MAX_EARLIER, as_json)
        return
    if a is None or b is None:
        raise click.UsageError("Name two, as in: gristmill compare MODEL MODEL:dtype=float32")
    if html is not None and not html.absolute().parent.is_dir():
        raise click.UsageError(f"--html {html}: there is no folder {html.parent}.")
    comparison, settings = _compared(a, b, file, limit, tokens, rounds, rate)
    kept, earlier = _kept(settings, comparison)
    if as_json:
        print_json(_record(comparison) | {"earlier": [_told(each) for each in earlier]})
    else:
        _print(comparison, earlier)
    if html is not None:
        from app.cli.comparison_page import page_of

        html.write_text(page_of(comparison, earlier))
        tell(f"Wrote {html}.")
    tell(kept)


def _compared(
    a: str,
    b: str,
    file: Any,
    limit: int | None,
    tokens: int,
    rounds: int,
    rate: float | None,
) -> tuple[Comparison, Settings]:
    from app.trials.compare import compare as compare_models
    from app.trials.contender import contender

    loaded = load_settings()
    try:
        both = contender(a, loaded), contender(b, loaded)
        questions = questions_of(file, limit, both[0].own.kind)
        with signals_interrupt(tell):
            found = compare_models(*both, questions, tokens, rounds, rate, tell)
    except (ConfigError, RequestError) as error:
        raise click.UsageError(str(error)) from None
    return found, loaded.settings


# ── what is kept ────────────────────────────────────────────────────────────────────────────────


def _kept(settings: Settings, found: Comparison) -> tuple[str, Sequence[StoredComparison]]:
    """Keep it. A sentence on that, and earlier ones of the same, newest first."""
    from app.store.comparisons import add_comparison, earlier_ones

    if not settings.database.url:
        return "Not kept: no database is set, and no `gristmill up` runs here.", ()
    new = _new(found)
    try:
        with _database(settings) as database, database.begin() as connection:
            add_comparison(connection, new)
            earlier = earlier_ones(connection, new, MAX_EARLIER)
    except GristmillError as error:
        return f"Not kept: {error}", ()
    told = f"there are {len(earlier)} earlier ones of the same" if earlier else "the first of these"
    return f"Kept in the table comparisons: {told}.", earlier


def _new(found: Comparison) -> NewComparison:
    from app.jobs import new_id
    from app.store.comparisons import NewComparison

    return NewComparison(
        id=new_id(),
        machine=found.machine,
        kind=found.kind,
        prompts_digest=found.prompts_digest,
        num_prompts=found.num_prompts,
        a=found.a.name,
        b=found.b.name,
        a_digest=found.a.digest,
        b_digest=found.b.digest,
        figures=found.figures,
    )


@contextlib.contextmanager
def _database(settings: Settings) -> Any:
    """Raises `GristmillError` if it cannot be reached, or its schema is another one."""
    from app.store.database import Database

    given = settings.database
    with contextlib.closing(
        Database(
            given.url,
            pool_size=2,
            connect_timeout_s=given.connect_timeout_s,
            statement_timeout_ms=given.statement_timeout_ms,
        )
    ) as database:
        database.check_schema()
        yield database


def _history(a: str | None, b: str | None, most: int, as_json: bool) -> None:
    from app.store.comparisons import list_comparisons

    settings = load_settings().settings
    if not settings.database.url:
        raise ConfigError(
            "database.url is empty and no `gristmill up` runs here: nothing was kept."
        )
    with _database(settings) as database, database.begin() as connection:
        found = list_comparisons(connection, a, b, most)
    if as_json:
        for each in found:
            print_json(_told(each))
        return
    columns = ("made at", "a", "b", *_SPEEDS, "agreement", "machine")
    print_table(columns, (_line(each, with_machine=True) for each in found))


def _told(each: StoredComparison) -> dict[str, Any]:
    return {
        "made_at": each.made_at.isoformat(),
        "machine": each.machine,
        "kind": each.kind,
        "prompts": each.num_prompts,
        "compare": [each.a, each.b],
        **each.figures,
    }


def _line(each: StoredComparison, *, with_machine: bool) -> tuple[object, ...]:
    """Of figures that a later version may have written: what is not there is left out."""
    from app.trials.compare import speed_in

    speeds = [speed_in(each.figures, name) for name in ("a", "b")]
    ratio = each.figures.get("speed_ratio")
    agreement = each.figures.get("agreement") or {}
    known = [name for name in MEASURES if name in agreement][:1]
    return (
        f"{each.made_at:%Y-%m-%d %H:%M}",
        *((each.a, each.b) if with_machine else ()),
        *("–" if speed is None else f"{speed:,.0f}" for speed in speeds),
        f"{ratio:.2f}" if isinstance(ratio, int | float) else "–",
        *(f"{name} {shown_figure(name, agreement[name])}" for name in known or ()),
        *(() if known else ("–",)),
        *((each.machine,) if with_machine else ()),
    )


# ── what is shown ───────────────────────────────────────────────────────────────────────────────


def _record(found: Comparison) -> dict[str, Any]:
    return {
        "compare": [found.a.name, found.b.name],
        "machine": found.machine,
        "kind": found.kind,
        "prompts": found.num_prompts,
        "prompts_digest": found.prompts_digest,
        **found.figures,
    }


def _print(found: Comparison, earlier: Sequence[StoredComparison]) -> None:
    from app.cli.comparison_page import agreement_rows, prompts_of, side_rows

    out.print(f"{found.machine}; {prompts_of(found)}", soft_wrap=True)
    out.print(f"a: {found.a.name}\nb: {found.b.name}\n", soft_wrap=True)
    print_table(("", "a", "b", "b over a"), side_rows(found))
    out.print()
    print_table(("agreement", "a with b", "a with itself", "b with itself"), agreement_rows(found))
    if earlier:
        out.print()
        columns = ("earlier", *_SPEEDS, "agreement")
        print_table(columns, (_line(each, with_machine=False) for each in earlier))


COMMANDS: Final = (compare,)
