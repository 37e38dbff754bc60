"""Who pays what for a step. Pure, in integers and fractions: shares add up exactly.

The measured time of a step is split by `share`, with weights that say what each row caused:
`decode_weights` or `prefill_weights`. Both are Shapley values of a step-time model: what is fixed
is paid in equal parts by those present, what grows with a row is paid by that row alone (the
airport rule of Littlechild and Owen, 1973).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import lcm


def share(total: int, weights: Sequence[int | Fraction]) -> list[int]:
    """Split `total` units by weight; the parts sum to it exactly.

    Every part is rounded down, and the units still missing go one each to the largest remainders,
    earlier ones first where they are equal. If all weights are 0, all pay the same. Raises
    `ValueError` for a negative number, and where nobody is there to pay.
    """
    scale = lcm(*(weight.denominator for weight in weights))
    whole = [weight.numerator * (scale // weight.denominator) for weight in weights]
    if total < 0 or any(weight < 0 for weight in whole):
        raise ValueError("Neither the total nor a weight may be negative.")
    if total and not whole:
        raise ValueError("There is nobody to share the total.")
    if not any(whole):
        whole = [1] * len(whole)
    split = [divmod(total * weight, sum(whole)) for weight in whole]
    parts = [part for part, _ in split]
    by_remainder = sorted(range(len(split)), key=lambda place: -split[place][1])
    for place in by_remainder[: total - sum(parts)]:
        parts[place] += 1
    return parts


def decode_weights(
    contexts: Sequence[int], fixed: int = 1, per_row: int = 0, per_token: int = 0
) -> list[int]:
    """What each row causes of one decode step, times the number of rows in it.

    With the set S of rows the step takes fixed + per_row·|S| + per_token·Σ tokens, and a row pays
    fixed/|S| + per_row + per_token·tokens: fetching the weights is shared, computing a row and
    reading its cache is not. A mate never raises a row's price. Only ratios matter, so everything
    is times |S|: whole numbers, since this runs at every step.
    """
    rows = len(contexts)
    return [fixed + rows * (per_row + per_token * each) for each in contexts]


def prefill_weights(
    lengths: Sequence[int], fixed: int = 0, per_position: int = 1
) -> list[Fraction]:
    """What each prompt causes of one padded forward pass over all of them.

    The pass takes fixed + per_position·B·longest. The fixed part is paid in equal parts. The padded
    width is cut at each distinct length; of a piece that d of the B prompts reach into, each other
    prompt pays len·d/(d+1) for its padding there, and those d pay the rest in equal parts. A longer
    mate raises a short prompt's price: padding is paid by both sides of the difference.
    """
    rows = len(lengths)
    with_length = Counter(lengths)
    needing, start = rows, 0
    own, padding = Fraction(0), Fraction(0)  # of all pieces so far
    until: dict[int, Fraction] = {}
    for end in sorted(with_length):
        piece = per_position * (end - start)
        spared = piece * Fraction(needing, needing + 1)
        own += (piece * rows - (rows - needing) * spared) / needing
        padding += spared
        until[end] = own - padding
        needing, start = needing - with_length[end], end
    return [Fraction(fixed, rows) + until[length] + padding for length in lengths]
