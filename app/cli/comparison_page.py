"""A comparison of two models as rows of a table, and as a page with pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from app import charts
from app.trials.agreement import MEASURES, shown_figure
from app.trials.compare import Comparison, Side, speed_in

if TYPE_CHECKING:
    from app.store.comparisons import StoredComparison

Row = tuple[str, str, str, str]

_LABEL_WIDTH: Final = 60
_ROW_HEIGHT: Final = 30


def prompts_of(found: Comparison) -> str:
    when = "all at once" if found.rate is None else f"{found.rate:g} a second"
    return f"{found.num_prompts} prompts, {when} in a round"


def side_rows(found: Comparison) -> Iterator[Row]:
    """What both took: a name, both figures, and the second over the first."""
    yield "engine", found.a.engine, found.b.engine, ""
    yield "dtype", found.a.dtype, found.b.dtype, ""
    for label, value, shown in _FIGURES:
        both = value(found.a), value(found.b)
        if both == (None, None):
            yield label, "absent", "absent", ""
            continue
        cells = ["absent" if each is None else shown(each) for each in both]
        ratio = f"{both[1] / both[0]:.2f}" if both[0] and both[1] is not None else "–"
        yield _labelled(label, found), cells[0], cells[1], ratio


def _labelled(label: str, found: Comparison) -> str:
    currencies = {each.currency for each in (found.a, found.b)} - {None}
    if label.startswith("cost") and len(currencies) == 1:
        return f"{label}, {currencies.pop()}"
    if label.startswith("energy"):
        return f"{label}, {' / '.join(dict.fromkeys((found.a.energy, found.b.energy)))}"
    return label


_FIGURES: Final[tuple[tuple[str, Callable[[Side], float | None], Callable[[float], str]], ...]] = (
    ("tokens of a round", lambda side: side.num_tokens, "{:,.0f}".format),
    ("tokens/s, median of the rounds", lambda side: side.speed, "{:,.1f}".format),
    ("wait and run of a prompt, p50, ms", lambda side: side.p50_ms, "{:,.0f}".format),
    ("wait and run of a prompt, p95, ms", lambda side: side.p95_ms, "{:,.0f}".format),
    ("device time of a round, s", lambda side: side.device_s, "{:,.2f}".format),
    (
        "cost of a million tokens",
        lambda side: side.cost_per_million_tokens,
        "{:,.4f}".format,
    ),
    (
        "energy of a million tokens, J",
        lambda side: side.joules_per_million_tokens,
        "{:,.0f}".format,
    ),
    (
        "most memory of the host, MB",
        lambda side: side.peak_bytes and side.peak_bytes / 1e6,
        "{:,.0f}".format,
    ),
    (
        "memory in use on the device, MB",
        lambda side: side.device_bytes and side.device_bytes / 1e6,
        "{:,.0f}".format,
    ),
    ("time to load, s", lambda side: side.load_s, "{:,.1f}".format),
    ("prompts without an answer", lambda side: side.num_failed, "{:,.0f}".format),
)


def agreement_rows(found: Comparison) -> Iterator[Row]:
    for name, measure in MEASURES.items():
        if name in found.agreement | found.a.itself | found.b.itself:
            cells = [
                shown_figure(name, figures[name]) if name in figures else "–"
                for figures in (found.agreement, found.a.itself, found.b.itself)
            ]
            yield measure.label, cells[0], cells[1], cells[2]


def page_of(found: Comparison, earlier: Sequence[StoredComparison]) -> str:
    """A whole HTML document that asks for nothing from anywhere."""
    parts = [
        charts.paragraph(f"a: {found.a.name}"),
        charts.paragraph(f"b: {found.b.name}"),
        charts.paragraph(f"{found.machine}; {prompts_of(found)}, in turns A B B A."),
        *_pictures(found),
        _heading("What both took"),
        charts.table(("", "a", "b", "b over a"), side_rows(found)),
        _heading("How far they agree"),
        charts.table(("", "a with b", "a with itself", "b with itself"), agreement_rows(found)),
    ]
    if drawn := _over_time(found, earlier):
        parts += [_heading("Earlier ones of the same, by age"), drawn]
    return charts.page("Two models over the same prompts", *parts)


def _pictures(found: Comparison) -> Iterator[str]:
    for label, value, shown in _FIGURES:
        both = [value(each) for each in (found.a, found.b)]
        if label in _DRAWN and any(both):
            spreads = [each.tokens_per_s for each in (found.a, found.b)]
            more = "; a circle is a round" if label == _SPEED else ""
            yield _heading(_labelled(label, found) + more)
            yield _bars(both, shown, spreads if label == _SPEED else None)


_SPEED: Final = "tokens/s, median of the rounds"
_DRAWN: Final = frozenset(
    {
        _SPEED,
        "wait and run of a prompt, p95, ms",
        "cost of a million tokens",
        "energy of a million tokens, J",
        "most memory of the host, MB",
    }
)


def _bars(
    values: Sequence[float | None],
    shown: Callable[[float], str],
    spreads: Sequence[Sequence[float]] | None,
) -> str:
    """A lying bar from 0 for a and for b, and where its rounds lie, if that is given."""
    known = [value or 0.0 for value in values]
    most = max([*known, *(value for each in spreads or () for value in each)]) or 1.0
    room = charts.WIDTH - _LABEL_WIDTH - 140
    parts = []
    for place, (name, value) in enumerate(zip("ab", values, strict=True)):
        y, width = place * _ROW_HEIGHT + 4, room * (value or 0.0) / most
        end = _LABEL_WIDTH + width
        parts += [
            f'<text x="{_LABEL_WIDTH - 10}" y="{y + 16}" text-anchor="end">{name}</text>',
            f'<rect x="{_LABEL_WIDTH}" y="{y}" width="{width:.1f}" height="{_ROW_HEIGHT - 8}" '
            f'fill="{charts.COLOURS[place]}"/>',
        ]
        for each in (spreads or ((), ()))[place]:
            x = _LABEL_WIDTH + room * each / most
            end = max(end, x)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y + 11}" r="4" class="axis" fill="none">'
                f"<title>{escape(shown(each))}</title></circle>"
            )
        told = "absent" if value is None else shown(value)
        parts.append(f'<text x="{end + 8:.1f}" y="{y + 16}">{escape(told)}</text>')
    return (
        f'<svg viewBox="0 0 {charts.WIDTH} {2 * _ROW_HEIGHT + 4}" role="img">{"".join(parts)}</svg>'
    )


def _over_time(found: Comparison, earlier: Sequence[StoredComparison]) -> str:
    """Tokens a second of both, oldest first; nothing without earlier ones."""
    if not earlier:
        return ""
    figures = [each.figures for each in reversed(earlier)] + [found.figures]
    series = []
    for name in ("a", "b"):
        speeds = [speed_in(each, name) for each in figures]
        points = [(place + 1.0, speed) for place, speed in enumerate(speeds) if speed is not None]
        series.append(charts.Series(name, points))
    x = charts.Axis("comparison, the last one is this")
    return charts.line_chart(series, x, charts.Axis("tokens/s"))


def _heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"
