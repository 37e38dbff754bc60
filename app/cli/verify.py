"""`gristmill verify`: does a model answer as plain transformers does?"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

import click
from rich.markup import escape

from app.cli.interrupts import signals_interrupt
from app.cli.prompts import limit_option, prompts_option, questions_of, tokens_option
from app.cli.terminal import (
    FAILED,
    as_json_option,
    load_settings,
    out,
    print_json,
    print_table,
    tell,
)
from app.errors import ConfigError, RequestError
from app.jobs import Kind
from app.trials.agreement import MEASURES, OF_KIND, Bound, main_measure, shown_figure

if TYPE_CHECKING:
    from app.trials.contender import Contender
    from app.trials.questions import Question
    from app.trials.verify import Verdict

ANY: Final = ""
"""In place of a measure's name: the one that stands for all."""


class BoundType(click.ParamType[Bound]):
    """`0.95` or `same_token=0.95`."""

    name = "[MEASURE=]VALUE"

    def __init__(self, *, of_shares: bool) -> None:
        self._of_shares = of_shares

    def convert(self, value: Any, *_: object) -> Bound:
        measure, equals, number = str(value).rpartition("=")
        fitting = [name for name, each in MEASURES.items() if each.is_share is self._of_shares]
        if measure not in fitting and not (self._of_shares and not equals):
            raise click.BadParameter(f"{value}: give one of {', '.join(fitting)} and =VALUE.")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not 0 <= limit <= (1 if self._of_shares else math.inf):
            most = "from 0 to 1" if self._of_shares else "from 0 on"
            raise click.BadParameter(f"{value}: the value is a number {most}.")
        return Bound(measure, limit)


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@prompts_option
@limit_option
@tokens_option
@click.option(
    "--fail-under",
    type=BoundType(of_shares=True),
    multiple=True,
    help="Exit with 1 if a share is less, as same_token=0.95; without a name it is the main one.",
)
@click.option(
    "--fail-over",
    type=BoundType(of_shares=False),
    multiple=True,
    help="Exit with 1 if a difference is more, as logprob_mean=0.05.",
)
@click.option(
    "--reference", help="Full weights to compare with, as `source`; else the model's own."
)
@as_json_option
def verify(
    models: tuple[str, ...],
    file: Any,
    limit: int | None,
    tokens: int,
    fail_under: tuple[Bound, ...],
    fail_over: tuple[Bound, ...],
    reference: str | None,
    as_json: bool,
) -> None:
    """Compare a model's engine with plain transformers in float32, alone and in company.

    MODEL is a configured one, with other settings behind it if it is to be tried with these:
    smollm2-135m-instruct:dtype=float32. All models are compared if none is named. Exit code 1 under
    a bound, or if a prompt has no answer.
    """
    from app.trials.contender import contender

    loaded = load_settings()
    try:
        chosen = [contender(name, loaded) for name in models or loaded.settings.models]
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    if reference is not None and len(chosen) != 1:
        raise click.UsageError("--reference is for one model: name it.")
    if file is not None and len({each.own.kind for each in chosen}) > 1:
        raise click.UsageError("The prompts of a file are for models of one kind: name them.")
    bounds = fail_under + fail_over
    measured = {name for each in chosen for name in OF_KIND[each.own.kind]}
    if strange := [each.measure for each in bounds if each.measure not in measured | {ANY}]:
        known = ", ".join(name for name in MEASURES if name in measured)
        raise click.UsageError(f"{strange[0]} is not measured of such a model; there is {known}.")
    asked = {kind: questions_of(file, limit, kind) for kind in {each.own.kind for each in chosen}}
    good: list[bool] = []
    with signals_interrupt(tell):
        for verdict, kind in _verdicts(chosen, asked, tokens, reference, is_named=bool(models)):
            kept = _kept(
                verdict, [each for each in bounds if each.measure in (ANY, *OF_KIND[kind])]
            )
            good.append(all(kept.values()) and not verdict.num_failed)
            (_print_json if as_json else _print)(verdict, kept)
    sys.exit(0 if good and all(good) else FAILED)


def _verdicts(
    chosen: Sequence[Contender],
    asked: Mapping[Kind, Sequence[Question]],
    tokens: int,
    reference: str | None,
    *,
    is_named: bool,
) -> Iterator[tuple[Verdict, Kind]]:
    """One model after the other. One that cannot be compared is wrong usage if it was named, and
    else told and left out."""
    from app.trials.verify import reference_folder, verify

    for contender in chosen:
        kind = contender.own.kind
        try:
            folder = reference_folder(contender, reference)
        except ConfigError as error:
            if is_named or len(chosen) == 1:
                raise click.UsageError(str(error)) from None
            tell(f"Left out: {error}")
            continue
        try:
            yield verify(contender, asked[kind], tokens, folder, tell), kind
        except RequestError as error:  # a prompt that the model does not take
            raise click.UsageError(str(error)) from None


def _kept(verdict: Verdict, bounds: Sequence[Bound]) -> dict[Bound, bool]:
    """Whether each bound is kept, with the measure's name where none was given."""
    figures = verdict.worst
    named = [
        replace(each, measure=main_measure(figures)) if figures and each.measure == ANY else each
        for each in bounds
    ]
    return {each: each.allows(figures) for each in named}


def _print_json(verdict: Verdict, kept: Mapping[Bound, bool]) -> None:
    told = asdict(verdict) | {"main": main_measure(verdict.worst) if verdict.worst else None}
    bounds = {each.measure: {"limit": each.limit, "kept": ok} for each, ok in kept.items()}
    print_json({"verify": verdict.model, **told, "bounds": bounds})


def _print(verdict: Verdict, kept: Mapping[Bound, bool]) -> None:
    out.print(
        f"[bold]{escape(verdict.model)}[/]: engine {verdict.engine}, dtype {verdict.dtype} "
        f"({escape(verdict.kernels)}); {verdict.num_prompts} prompts"
        + (f", {verdict.num_tokens} tokens of answers" if verdict.num_tokens else "")
        + (f"; [red]{verdict.num_failed} had no answer[/]" if verdict.num_failed else ""),
        markup=True,
        soft_wrap=True,
    )
    limits = {each.measure: (each, ok) for each, ok in kept.items()}
    rows = [
        (
            MEASURES[name].label,
            _shown(verdict.alone.get(name), name),
            _shown(verdict.company.get(name), name),
            _bound(*limits[name]) if name in limits else "",
        )
        for name in MEASURES
        if name in verdict.alone | verdict.company | limits
    ]
    print_table(("against transformers in float32", "alone", "in company", "bound"), rows)


def _bound(bound: Bound, is_kept: bool) -> str:
    side = "≥" if MEASURES[bound.measure].is_share else "≤"
    return f"{side} {bound.limit:g} {'kept' if is_kept else 'NOT KEPT'}"


def _shown(value: float | None, name: str) -> str:
    if value is None:
        return "–"
    return shown_figure(name, value)


COMMANDS: Final = (verify,)
