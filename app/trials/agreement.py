"""How much two models agree over the same prompts. Pure.

The first of both is the reference: tokens of the second are looked at where the first has its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from app.jobs import Kind

Vector = Sequence[float]


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of agreement."""

    label: str
    is_share: bool = True  #: from 0 to 1, and 1 is best; others are from 0 on, and 0 is best


MEASURES: Final = {
    "identical": Measure("identical texts"),
    "prefix": Measure("common beginning, share of the tokens"),
    "positions": Measure("same token at the same place"),
    "same_token": Measure("same token after the same tokens"),
    "logprob_mean": Measure("log-probability, mean difference", is_share=False),
    "logprob_max": Measure("log-probability, largest difference", is_share=False),
    "perplexity": Measure("perplexity, relative difference", is_share=False),
    "cosine_mean": Measure("cosine, mean"),
    "cosine_min": Measure("cosine, smallest"),
    "same_class": Measure("same class"),
    "same_order": Measure("same order of two documents"),
    "score_mean": Measure("score, mean difference", is_share=False),
    "score_max": Measure("score, largest difference", is_share=False),
}
"""By name, in the order in which they are shown."""

_TEXTS: Final = (
    *("identical", "prefix", "positions", "same_token"),
    *("logprob_mean", "logprob_max", "perplexity"),
)
OF_KIND: Final[dict[Kind, tuple[str, ...]]] = {
    Kind.GENERATE: _TEXTS,
    Kind.TRANSLATE: _TEXTS,
    Kind.EMBED: ("cosine_mean", "cosine_min"),
    Kind.CLASSIFY: ("same_class", "score_mean", "score_max"),
    Kind.RERANK: ("same_order", "score_mean", "score_max"),
}
"""What is measured of a kind of models. Of texts from a server that tells no tokens it is the first
alone."""

MAIN: Final = ("same_token", "positions", "identical", "cosine_mean", "same_class", "same_order")
"""The measure that stands for all: the first of these that there is."""

Figures = dict[str, float]
"""Values by the name of their measure."""


@dataclass(frozen=True, slots=True)
class Writing:
    """A text that was written."""

    text: str
    tokens: tuple[int, ...] = ()  #: the one that ended it included; () where a server tells none


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model makes of given tokens, each after those before it."""

    logprobs: tuple[float, ...]  #: of these tokens
    likeliest: tuple[int, ...]  #: what it would have taken in their place


def of_texts(pairs: Iterable[tuple[Writing, Writing]], *, by_token: bool = True) -> Figures:
    """Of texts that both wrote on their own. `by_token`: their token ids mean the same."""
    found = list(pairs)
    figures = {"identical": _mean(a.text == b.text for a, b in found)}
    if by_token and all(a.tokens and b.tokens for a, b in found):
        longest = [max(len(a.tokens), len(b.tokens)) for a, b in found]
        same = sum(x == y for a, b in found for x, y in zip(a.tokens, b.tokens, strict=False))
        common = [common_prefix(a.tokens, b.tokens) for a, b in found]
        figures["prefix"] = _mean(c / most for c, most in zip(common, longest, strict=True))
        figures["positions"] = same / sum(longest)
    return figures


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def of_readings(pairs: Iterable[tuple[Reading, Reading]]) -> Figures:
    """Of what both make of the same tokens, as far as both have read them. Empty if of none.

    Perplexity is exp(-mean log-probability) over all tokens; its difference is relative to the
    first's.
    """
    first: list[float] = []
    second: list[float] = []
    same: list[bool] = []
    for a, b in pairs:
        known = min(len(a.logprobs), len(b.logprobs))
        first += a.logprobs[:known]
        second += b.logprobs[:known]
        same += [x == y for x, y in zip(a.likeliest, b.likeliest, strict=False)]
    figures = {"same_token": _mean(same)} if same else {}
    if first:
        off = [abs(a - b) for a, b in zip(first, second, strict=True)]
        shift = (math.fsum(first) - math.fsum(second)) / len(first)
        figures["logprob_mean"] = math.fsum(off) / len(off)
        figures["logprob_max"] = max(off)
        figures["perplexity"] = abs(math.expm1(min(shift, _MOST_SHIFT)))
    return figures


_MOST_SHIFT: Final = 700.0
"""e to the power of more is no float."""


def of_vectors(pairs: Iterable[tuple[Vector, Vector]]) -> Figures:
    found = [cosine(a, b) for a, b in pairs]
    return {"cosine_mean": _mean(found), "cosine_min": min(found)}


def cosine(first: Vector, second: Vector) -> float:
    """From -1 to 1; 0 where one of them has no direction."""
    products = (a * b for a, b in zip(_unit(first), _unit(second), strict=True))
    return max(-1.0, min(1.0, math.fsum(products)))


def _unit(vector: Vector) -> list[float]:
    """Of length 1, however short or long it is; zeros stay zeros."""
    largest = max(map(abs, vector), default=0.0) or 1.0
    scaled = [each / largest for each in vector]
    length = math.hypot(*scaled) or 1.0
    return [each / length for each in scaled]


def of_classes(pairs: Iterable[tuple[Vector, Vector]]) -> Figures:
    """Of scores for each class."""
    found = list(pairs)
    return {"same_class": _mean(_largest(a) == _largest(b) for a, b in found), **_of_scores(found)}


def of_rankings(requests: Iterable[Sequence[tuple[Vector, Vector]]]) -> Figures:
    """Of the scores of each request's documents: in which order any two of them come."""
    orders: list[bool] = []
    scores: list[tuple[Vector, Vector]] = []
    for documents in requests:
        scores += documents
        for place, (a, b) in enumerate(documents):
            orders += [(a[0] < x[0]) == (b[0] < y[0]) for x, y in documents[:place]]
    return {**({"same_order": _mean(orders)} if orders else {}), **_of_scores(scores)}


def _of_scores(pairs: Sequence[tuple[Vector, Vector]]) -> Figures:
    off = [abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)]
    return {"score_mean": math.fsum(off) / len(off), "score_max": max(off)}


def _largest(scores: Vector) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def shown_figure(name: str, value: float) -> str:
    """For people. What is not quite all, or nothing, does not look so."""
    if name.startswith("cosine"):
        return f"{value:.6f}"
    if name == "perplexity":
        return f"{value:.2%}"
    if not MEASURES[name].is_share:
        return f"{value:.5f}"
    if 0 < value < 1:
        value = min(max(value, 0.0001), 0.9999)
    return f"{value:.2%}"


def worst(figures: Iterable[Figures]) -> Figures:
    """Each measure at its worst."""
    found: Figures = {}
    for each in figures:
        for name, value in each.items():
            worse = min if MEASURES[name].is_share else max
            found[name] = worse(found.get(name, value), value)
    return found


def main_measure(figures: Figures) -> str:
    """The name of the measure that stands for all."""
    return next(name for name in MAIN if name in figures)


@dataclass(frozen=True, slots=True)
class Bound:
    """How good a measure has to be: at least, for a share; at most, for a difference."""

    measure: str
    limit: float

    def allows(self, figures: Figures) -> bool:
        """Whether it is kept; what was not measured is not, and what is no number neither."""
        if (value := figures.get(self.measure)) is None:
            return False
        return value >= self.limit if MEASURES[self.measure].is_share else value <= self.limit
