"""How much jobs ask for, and some cost of theirs as a sum of its parts. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final


@dataclass(frozen=True, slots=True)
class Size:
    """How much one or more jobs ask for."""

    jobs: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0  #: to be generated; of jobs that wait, as many as are likely

    def __add__(self, other: Size) -> Size:
        return Size(
            self.jobs + other.jobs,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )

    def times(self, factor: float) -> Size:
        return Size(self.jobs * factor, self.input_tokens * factor, self.output_tokens * factor)

    def with_output(self, share: float) -> Size:
        """The same with this share of the output."""
        return Size(self.jobs, self.input_tokens, self.output_tokens * share)


NOTHING: Final = Size()


@dataclass(frozen=True, slots=True)
class Weights:
    """Some cost of a job as a sum of its parts, none of them negative."""

    per_job: float = 0.0
    per_input_token: float = 0.0
    per_output_token: float = 0.0

    def of(self, size: Size) -> float:
        return (
            self.per_job * size.jobs
            + self.per_input_token * size.input_tokens
            + self.per_output_token * size.output_tokens
        )


ONE_EACH: Final = Weights(per_job=1.0)


def fit(sizes: Sequence[Size], costs: Sequence[float]) -> Weights:
    """Weights without a negative one whose costs of these sizes are nearest to `costs`.

    Non-negative least squares: with three weights each subset of them is solved, and the best one
    without a negative weight is taken. All are 0 if all costs are.
    """
    rows = [(size.jobs, size.input_tokens, size.output_tokens) for size in sizes]
    squares = [[sum(row[i] * row[j] for row in rows) for j in range(3)] for i in range(3)]
    target = [sum(row[i] * cost for row, cost in zip(rows, costs, strict=True)) for i in range(3)]
    best, least = (0.0, 0.0, 0.0), 0.0
    for chosen in (each for n in (1, 2, 3) for each in combinations(range(3), n)):
        found = _solved(
            [[squares[i][j] for j in chosen] for i in chosen], [target[i] for i in chosen]
        )
        if found is None or min(found) < 0:
            continue
        # Of the sum of squared errors, what depends on the weights.
        loss = -sum(target[i] * weight for i, weight in zip(chosen, found, strict=True))
        if loss < least * (1 + 1e-9):
            least = loss
            weights = dict(zip(chosen, found, strict=True))
            best = (weights.get(0, 0.0), weights.get(1, 0.0), weights.get(2, 0.0))
    return Weights(*best)


def _solved(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """The solution of a small symmetric system; None if it has none that is sound."""
    size = len(right)
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for place in range(size):
        pivot = rows[place][place]
        if pivot <= 1e-9 * matrix[place][place] or not math.isfinite(pivot):
            return None
        for other in range(size):
            if other != place:
                factor = rows[other][place] / pivot
                rows[other] = [
                    a - factor * b for a, b in zip(rows[other], rows[place], strict=True)
                ]
    return [rows[place][size] / rows[place][place] for place in range(size)]
