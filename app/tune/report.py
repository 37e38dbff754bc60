"""What a search came to: the setting to take, as a table, JSON, a page, and lines of TOML. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from app.charts import Axis, Series, code, line_chart, number, page, paragraph, table
from app.config.settings import ModelSettings, Policy, PriceSettings
from app.tune.frontier import Point, Ratio, Setting, cheapest, frontier, ratios, total_ratio
from app.tune.replay import Arrival
from app.worker.batcher import STATIC_WAIT_NS
from app.worker.policy import StepCost

SHOWN: Final = 8
"""Settings of each policy's frontier in a table."""
SHARES: Final = (1.02, 1.05, 1.1, 1.2, 1.5, 2.0)
"""p95s at which the policies are compared, in units of the tightest that a fixed wait keeps."""
WAIT_COSTS: Final = (0.01, 0.03, 0.1)
ALIKE: Final = 1.01
"""Settings whose device time differs by less are equally cheap."""
BINS: Final = 60

COLUMNS: Final = ("", "policy", "size", "wait ms", "wait_cost", "p50 ms", "p95 ms", "p99 ms",
                  "batch", "device ms/job", "busy", "cost/1M jobs")  # fmt: skip


def setting_of(model: ModelSettings) -> Setting:
    """What is set now, of a model whose engine nobody can join."""
    wait_ms = STATIC_WAIT_NS / 1e6 if model.max_wait_ms is None else model.max_wait_ms
    is_fixed = model.batch.policy is Policy.FIXED
    return Setting(model.max_batch_size, wait_ms, None if is_fixed else model.batch.wait_cost)


@dataclass(frozen=True, slots=True)
class Report:
    model: str
    source: str  #: of the trace, in words
    trace: Sequence[Arrival]
    cost: StepCost
    cost_source: str  #: in words
    price: PriceSettings | None
    points: Sequence[Point]
    current: Point
    target_ms: float  #: the p95 to keep
    joins: bool = False  #: sequences join between steps: their number alone is tried

    @property
    def chosen(self) -> Point:
        """The quickest of the cheapest that keep the target; where none does, the quickest."""
        best = cheapest(self.points, self.target_ms)
        if best is None:
            return min(self.points, key=lambda point: (point.p95_ms, point.device_s))
        alike = [
            point
            for point in self.points
            if point.p95_ms <= self.target_ms and point.device_s <= ALIKE * best.device_s
        ]
        return min(alike, key=lambda point: point.mean_ms)

    @property
    def keeps_target(self) -> bool:
        return self.chosen.p95_ms <= self.target_ms

    @property
    def ratios(self) -> list[Ratio]:
        return ratios(self.points, SHARES)

    def frontier(self, policy: Policy) -> list[Point]:
        return frontier(point for point in self.points if point.setting.policy is policy)

    def cost_per_million(self, point: Point) -> float | None:
        """Money for the device's work on a million jobs; its idle time is not in it."""
        if self.price is None:
            return None
        return 1e6 * point.device_ms_per_job / 3_600_000 * float(self.price.per_device_hour)

    # ── as a table ───────────────────────────────────────────────────────────────────────────

    def rows(self) -> list[tuple[str, ...]]:
        named = [("now", self.current), ("recommended", self.chosen)]
        for policy in Policy:
            named += [("", point) for point in _thinned(self.frontier(policy))]
        return [self._row(name, point) for name, point in named]

    def _row(self, name: str, point: Point) -> tuple[str, ...]:
        setting, money = point.setting, self.cost_per_million(point)
        return (
            name,
            setting.policy.value,
            str(setting.max_batch_size),
            "" if self.joins else number(setting.max_wait_ms),
            "" if setting.wait_cost is None else f"{setting.wait_cost:g}",
            *(number(each) for each in (point.p50_ms, point.p95_ms, point.p99_ms)),
            f"{point.mean_size:.1f}",
            number(point.device_ms_per_job),
            f"{100 * point.busy:.0f} %",
            "" if money is None or self.price is None else f"{number(money)} {self.price.currency}",
        )

    def sentences(self) -> list[str]:
        span_s = self.trace[-1].at_ns / 1e9
        cost = self.cost
        unit = "step" if self.joins else "batch"
        takes = f"{number(cost.fixed_ns / 1e6)} + {number(cost.row_ns / 1e6)}·n ms"
        told = [
            f"{len(self.trace):,} jobs in {number(span_s)} s ({self.source}); a {unit} of n "
            f"sequences takes {takes} ({self.cost_source}).",
        ]
        if not self.keeps_target:
            told.append(f"No setting keeps a p95 of {number(self.target_ms)} ms; this is nearest.")
        more = self.chosen.device_s / self.current.device_s - 1
        told.append(
            f"Recommended: p95 {number(self.chosen.p95_ms)} ms (now "
            f"{number(self.current.p95_ms)}), {number(self.chosen.device_ms_per_job)} ms of the "
            f"device a job (now {number(self.current.device_ms_per_job)}, {100 * more:+.0f} %)."
        )
        if not (found := self.ratios):
            return told
        at = ", ".join(f"{each.device:.2f} at {number(each.p95_ms)} ms" for each in found)
        told.append(f"Device time of the adaptive policy over the best fixed wait's, at p95: {at}.")
        totals = ", ".join(
            f"{total_ratio(self.points, each):.2f} at {each:g}" for each in WAIT_COSTS
        )
        told.append(f"The same with every second of waiting priced in device seconds: {totals}.")
        return told

    # ── as JSON, TOML and a page ─────────────────────────────────────────────────────────────

    def json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "trace": {"source": self.source, "jobs": len(self.trace),
                      "seconds": self.trace[-1].at_ns / 1e9},
            "batch_ms": {"fixed": self.cost.fixed_ns / 1e6, "per_sequence": self.cost.row_ns / 1e6,
                         "source": self.cost_source},
            "target_p95_ms": self.target_ms,
            "now": self._told(self.current),
            "recommended": self._told(self.chosen),
            "frontier": {
                policy.value: [self._told(point) for point in self.frontier(policy)]
                for policy in Policy
            },
            "adaptive_over_fixed": [
                {
                    "p95_ms": each.p95_ms,
                    "device": each.device,
                    "mean_latency": each.mean_latency,
                    "fixed": self._told(each.fixed),
                    "adaptive": self._told(each.adaptive),
                }
                for each in self.ratios
            ],
            "adaptive_over_fixed_with_waiting": {
                f"{each:g}": total_ratio(self.points, each) for each in WAIT_COSTS if self.ratios
            },
        }  # fmt: skip

    def _told(self, point: Point) -> dict[str, Any]:
        told = asdict(point)
        return {
            "policy": point.setting.policy.value,
            **told.pop("setting"),
            **told,
            "device_ms_per_job": point.device_ms_per_job,
            "cost_per_million_jobs": self.cost_per_million(point),
        }

    def toml(self) -> str:
        """Lines that the settings file takes."""
        setting = self.chosen.setting
        lines = [
            f"# gristmill tune: {_one_line(self.source)}, {len(self.trace):,} jobs; "
            f"p95 {number(self.chosen.p95_ms)} ms (was {number(self.current.p95_ms)}), "
            f"{number(self.chosen.device_ms_per_job)} ms of the device a job (was "
            f"{number(self.current.device_ms_per_job)}).",
            f"[models.{_key(self.model)}]",
            f"max_batch_size = {setting.max_batch_size}",
        ]
        if self.joins:
            return "\n".join(lines) + "\n"
        lines += [
            f"max_wait_ms = {float(setting.max_wait_ms)}",
            f'batch.policy = "{setting.policy.value}"',
        ]
        if setting.wait_cost is not None:
            lines.append(f"batch.wait_cost = {setting.wait_cost}")
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        series = [
            *(self._series(f"{policy.value} wait", self.frontier(policy)) for policy in Policy),
            self._series("now", [self.current]),
            self._series("recommended", [self.chosen]),
        ]
        return page(
            f"gristmill tune: {self.model}",
            *map(paragraph, self.sentences()),
            line_chart(
                [each for each in series if each.points],
                Axis("p95 of latency, ms", is_log=True),
                Axis("device time for a job, ms"),
            ),
            paragraph(
                "Each point is a setting that none is quicker and cheaper than; point at it. The "
                "device is up all the time: what it costs while idle is the same under all."
            ),
            line_chart(
                [Series("jobs a second", _rates(self.trace))],
                Axis("seconds of the trace"),
                Axis("jobs a second"),
            ),
            table(COLUMNS, self.rows()),
            paragraph("Recommended settings:"),
            code(self.toml()),
        )

    def _series(self, name: str, points: Sequence[Point]) -> Series:
        return Series(
            name,
            [(max(point.p95_ms, 1e-3), point.device_ms_per_job) for point in points],
            [_note(name, point) for point in points],
            radius=3.5 if len(points) > 1 else 7,
        )


def _note(name: str, point: Point) -> str:
    setting = point.setting
    cost = "" if setting.wait_cost is None else f", wait_cost {setting.wait_cost:g}"
    return (
        f"{name}: size {setting.max_batch_size}, wait {number(setting.max_wait_ms)} ms{cost}; "
        f"p95 {number(point.p95_ms)} ms, {number(point.device_ms_per_job)} ms a job"
    )


def _thinned(points: Sequence[Point]) -> list[Point]:
    """A few of them, the ends included."""
    if len(points) <= SHOWN:
        return list(points)
    return [points[round(place * (len(points) - 1) / (SHOWN - 1))] for place in range(SHOWN)]


def _rates(trace: Sequence[Arrival]) -> list[tuple[float, float]]:
    """Jobs a second in equal pieces of the trace."""
    piece_s = max(trace[-1].at_ns, 1) / 1e9 / BINS
    counts = [0] * BINS
    for job in trace:
        counts[min(BINS - 1, int(job.at_ns / 1e9 / piece_s))] += 1
    return [((place + 0.5) * piece_s, count / piece_s) for place, count in enumerate(counts)]


def _key(name: str) -> str:
    """A name as a key of TOML."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
