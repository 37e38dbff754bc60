"""What is used, in money. Pure, and exact to the last nano-unit."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Final

NANO: Final = Decimal("0.000000001")
MILLION: Final = 1_000_000
HOUR_NS: Final = 3_600_000_000_000


@dataclass(frozen=True, slots=True)
class Used:
    """What is paid for."""

    device_ns: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    charge: Decimal = Decimal(0)  #: what a server from outside has asked for

    def __add__(self, other: Used) -> Used:
        return Used(
            self.device_ns + other.device_ns,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.charge + other.charge,
        )


class Meter:
    """Money for what was used, to 9 decimals. What it charges adds up to the price of the sum.

    Each charge is the rise of a running total, so that no fraction of a nano-unit is lost or
    charged twice, however small the shares are.
    """

    def __init__(
        self,
        per_device_hour: Decimal,
        per_million_input_tokens: Decimal = Decimal(0),
        per_million_output_tokens: Decimal = Decimal(0),
    ) -> None:
        self._per_device_hour = per_device_hour
        self._per_million = per_million_input_tokens, per_million_output_tokens
        self._used = Used()
        self._charged = Decimal(0)

    def cost_of(self, used: Used) -> Decimal:
        self._used += used
        before, self._charged = self._charged, self._price()
        return self._charged - before

    def _price(self) -> Decimal:
        used, (per_input, per_output) = self._used, self._per_million
        tokens = used.input_tokens * per_input + used.output_tokens * per_output
        exact = used.device_ns * self._per_device_hour / HOUR_NS + tokens / MILLION + used.charge
        return exact.quantize(NANO)
