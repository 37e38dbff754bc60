"""Other batch settings, tried on traffic that was, or could be."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from app.cli.options import Time
from app.cli.terminal import as_json_option, load_settings, print_json, print_table, tell
from app.errors import ConfigError

if TYPE_CHECKING:
    from app.config.file import Loaded
    from app.config.settings import ModelSettings
    from app.store.database import Database
    from app.store.traffic import Came
    from app.tune.report import Report
    from app.worker.policy import StepCost

DAY = timedelta(days=1)
BATCHES = 20_000
"""Most batches that costs are fitted to."""
HEADER = "# gristmill tune: "
TELL_S = 15.0


class StepMs(click.ParamType[tuple[float, float]]):
    """`100,8`: milliseconds of a batch, and of each of its sequences."""

    name = "FIXED,EACH"

    def convert(self, value: Any, *_: object) -> tuple[float, float]:
        try:
            fixed, each = (float(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"{value}: give two numbers, as in 100,8.") from None
        if not (0 <= fixed <= 1e9 and 0 <= each <= 1e9 and fixed + each > 0):
            raise click.BadParameter(f"{value}: milliseconds from 0 to 1e9, and not both 0.")
        return fixed, each


@click.command()
@click.argument("model", required=False)
@click.option("--trace", "file", type=click.Path(path_type=Path), help="CSV of arrivals: at_s, …")
@click.option("--synthetic", metavar="SPEC", help="Made-up arrivals, as in swing:1-100/60.")
@click.option("--since", type=Time(is_ahead=False), help="Jobs since then; or 90m, 12h ago. [1d]")
@click.option("--until", type=Time(is_ahead=False), help="Jobs before then; or as long ago.")
@click.option(
    "--jobs",
    type=click.IntRange(2, 1_000_000),
    default=3_000,
    show_default=True,
    help="Most jobs: the last ones.",
)
@click.option(
    "--step-ms",
    type=StepMs(),
    help="What a batch takes, and each sequence in it; else fitted to the batches that ran.",
)
@click.option(
    "--p95-ms",
    type=click.FloatRange(0, 1e9, min_open=True),
    help="The p95 to keep; else that of the settings now.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1, 1_000_000),
    default=64,
    show_default=True,
    help="Of a made-up answer, where sequences join between steps.",
)
@click.option("--seed", type=int, default=0, help="Of made-up arrivals.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with pictures.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the settings, as TOML.")
@click.option("--save-trace", type=click.Path(path_type=Path), help="Write the trace, as CSV.")
@as_json_option
def tune(
    model: str | None,
    html: Path | None,
    write: Path | None,
    save_trace: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Try batch sizes, waits and the adaptive policy on a trace, and recommend settings.

    The trace is of the jobs that ran (--since, --until), of a file, or made up:
    constant:RATE, or bursts, swing or steps as in swing:LOW-HIGH/PERIOD, in jobs a second and
    seconds. It is replayed through the worker's own batcher, on a simulated clock and device. Where
    sequences join between steps, nothing waits for company: the number of rows alone is tried.
    """
    from app.tune import trace

    if write is not None:
        _check_ours(write)
    loaded = load_settings()
    name = _model(loaded, model)
    report = _report(loaded, name, **asked)
    if save_trace is not None:
        trace.write(report.trace, save_trace)
    if html is not None:
        html.write_text(report.html(), "utf-8")
    if write is not None:
        write.write_text(report.toml(), "utf-8")
    if as_json:
        print_json(report.json())
        return
    from app.tune.report import COLUMNS

    print_table(COLUMNS, report.rows())
    for sentence in report.sentences():
        tell(sentence)
    if write is None:
        tell(report.toml().partition("\n")[2].strip())


def _check_ours(file: Path) -> None:
    """A file that holds anything else is not written over."""
    if file.exists() and not file.read_text("utf-8", "replace").startswith(HEADER):
        raise click.UsageError(f"--write {file}: it is there, and not from `gristmill tune`.")


def _model(loaded: Loaded, asked: str | None) -> str:
    models = loaded.settings.models
    known = ", ".join(models)
    if asked is None:
        if len(models) != 1:
            raise click.UsageError(f"Say which model: {known}.")
        return next(iter(models))
    if asked not in models:
        raise click.UsageError(f"No model {asked} is configured; there is {known}.")
    return asked


def _report(
    loaded: Loaded,
    name: str,
    *,
    file: Path | None,
    synthetic: str | None,
    since: datetime | None,
    until: datetime | None,
    jobs: int,
    step_ms: tuple[float, float] | None,
    p95_ms: float | None,
    tokens: int,
    seed: int,
) -> Report:
    from app.engines import registry
    from app.tune import trace
    from app.tune.frontier import Bench
    from app.tune.replay import Arrival
    from app.tune.report import Report, setting_of

    if file is not None and synthetic is not None:
        raise click.UsageError("Give --trace or --synthetic, and not both.")
    if (file or synthetic) and step_ms and (since or until):
        raise click.UsageError("--since and --until are of jobs and batches that ran.")
    until = until or datetime.now(UTC)
    since = since or until - DAY
    if since >= until:
        raise click.UsageError("--since is not before --until.")
    model = loaded.settings.models[name]
    joins = registry.find(model.engine).joins(model)
    if file is not None:
        arrivals, source = trace.read(file)[-jobs:], str(file)
    elif synthetic is not None:
        arrivals, source = trace.synthetic(synthetic, jobs, seed, tokens if joins else 0), synthetic
    else:
        arrivals = [
            Arrival(
                round(each.at.timestamp() * 1e9),
                each.rows,
                each.input_tokens // each.rows,
                (each.generated if joins else each.output_tokens) // each.rows,
            )
            for each in _recorded(loaded, name, since, until, jobs)
        ]
        source = f"jobs of {name}"
    arrivals = trace.from_zero(trace.checked(arrivals, source))
    cost, cost_source = _cost(loaded, name, since, until, step_ms, joins=joins)
    bench = Bench(arrivals, cost, model.max_batch_tokens, _progress(), joins=joins)
    current = setting_of(model)
    bench.search(_sizes(model, max(job.rows for job in arrivals)), current)
    point = bench.point(current)
    price = loaded.settings.prices.get(model.price or loaded.settings.worker.price)
    target_ms = p95_ms or point.p95_ms
    points = list(bench.points.values())
    return Report(name, source, arrivals, cost, cost_source, price, points, point, target_ms, joins)


def _sizes(model: ModelSettings, least: int) -> list[int]:
    """Up to what is set, which is what memory holds, and from the largest job of the trace on: a
    smaller size would refuse it."""
    most = model.max_batch_size
    some = {max(1, round(most * share)) for share in (1, 0.75, 0.5, 0.375, 0.25, 0.125)}
    return sorted(size for size in some if size in (most, max(size, least)))


def _progress() -> Callable[[], None]:
    """Says how far it is, to who waits for long."""
    told_s, count = time.monotonic(), 0

    def tried() -> None:
        nonlocal told_s, count
        count += 1
        if time.monotonic() - told_s > TELL_S:
            told_s = time.monotonic()
            tell(f"{count} settings are tried, of some hundreds; fewer --jobs take less.")

    return tried


def _recorded(
    loaded: Loaded, model: str, since: datetime, until: datetime, jobs: int
) -> list[Came]:
    from app.store import traffic

    with _database(loaded) as database, database.autocommit() as connection:
        return traffic.came(connection, model, since, until, jobs)


def _database(loaded: Loaded) -> closing[Database]:
    from app.store.database import Database

    return closing(Database(loaded.connected().database.url, pool_size=1))


def _cost(
    loaded: Loaded,
    model: str,
    since: datetime,
    until: datetime,
    step_ms: tuple[float, float] | None,
    *,
    joins: bool,
) -> tuple[StepCost, str]:
    """What a batch takes, or a step where sequences join, and how that is known."""
    from app.tune.frontier import fitted
    from app.worker.policy import StepCost

    if step_ms is not None:
        return StepCost(step_ms[0] * 1e6, step_ms[1] * 1e6), "given"
    try:
        ran = _measured(loaded, model, since, until, joins=joins)
    except ConfigError as error:
        raise ConfigError(f"{error} Or say what a batch takes: --step-ms.") from None
    found = fitted(ran)
    if found is None:
        raise click.UsageError(
            f"No batch of {model} ran between {since:%Y-%m-%d %H:%M} and {until:%Y-%m-%d %H:%M} "
            "UTC: run some jobs, choose another time, or say what a batch takes: --step-ms."
        )
    cost, off = found
    what = "jobs" if joins else "batches"
    told = f"fitted to {len(ran):,} {what}, off by {100 * off:.0f} % on average"
    if len({rows for rows, _ in ran}) == 1:
        told += "; all had one size, so half of their time is taken as fixed"
    return cost, told


def _measured(
    loaded: Loaded, model: str, since: datetime, until: datetime, *, joins: bool
) -> list[tuple[float, float]]:
    """Sequences that ran together, and what that took in nanoseconds."""
    from app.store import traffic
    from app.tune.joined import step

    if joins:
        came = _recorded(loaded, model, since, until, BATCHES)
        steps = (
            step(each.rows, each.generated, each.inference_ns, each.device_ns) for each in came
        )
        return [found for found in steps if found is not None]
    with _database(loaded) as database, database.autocommit() as connection:
        ran = traffic.ran(connection, model, since, until, BATCHES)
    return [(each.rows, each.device_ns) for each in ran]
