"""What is used, in money. Pure, and exact to the last nano-unit.

One rule for device time: `device_ns` nanoseconds at `P` nano-units of money an hour are

    (2 · device_ns · P + H) div 2H      nano-units, with H = 3.6e12 nanoseconds an hour

that is, half up, and so every row says by itself what it costs. What the halves leave over is
booked where the device's time is (`rounding` of the worker's windows). Tokens have a tariff beside
it, for those who bill by them: a second figure, of the same usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Final

from app.config.settings import PriceSettings
from app.jobs import Usage

NANO: Final = Decimal("0.000000001")
HOUR_NS: Final = 3_600_000_000_000
_ONE: Final = 10**9  #: in nano-units
MILLION: Final = 10**6


def in_nano(amount: Decimal) -> int:
    """Money as nano-units; what is finer than one is rounded half up."""
    numerator, denominator = amount.as_integer_ratio()
    return _half_up(numerator * _ONE, denominator)


def money(nano: int) -> Decimal:
    """Nano-units as money, to 9 decimals."""
    return Decimal(nano).scaleb(-9)


def device_cost(device_ns: int, per_device_hour: Decimal) -> Decimal:
    """What device time costs: the rule. Less than nothing costs as much less than nothing."""
    cost = _half_up(abs(device_ns) * in_nano(per_device_hour), HOUR_NS)
    return money(cost if device_ns >= 0 else -cost)


def token_charge(price: PriceSettings, usage: Usage) -> Decimal | None:
    """What tokens cost by the price's tariff, half up; None if it has none.

    Cached prompt tokens are counted among the prompt's, and priced apart.
    """
    if not price.has_tariff:
        return None
    cached_price = price.per_million_cached_input_tokens
    cached = min(usage.cached_tokens, usage.input_tokens)
    full = (
        (usage.input_tokens - cached) * in_nano(price.per_million_input_tokens)
        + cached * in_nano(price.per_million_input_tokens if cached_price is None else cached_price)
        + usage.output_tokens * in_nano(price.per_million_output_tokens)
    )
    return money(_half_up(full * (_ONE - in_nano(price.batch_discount)), MILLION * _ONE))


def upstream_cost(price: PriceSettings, usage: Usage, asked: Sequence[Decimal]) -> Decimal | None:
    """What servers elsewhere cost: what they `asked` by themselves, and, where the price knows no
    device, the tokens by its tariff. None if they have no part in it."""
    tariff = None if price.per_device_hour else token_charge(price, usage)
    if tariff is None and not asked:
        return None
    return money(in_nano(sum(asked, tariff or Decimal(0))))


def _half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
