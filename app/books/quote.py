"""What a job is likely to cost, before it runs. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from app.books.cost import device_cost, token_charge, upstream_cost
from app.books.eta import Pace
from app.books.work import Size
from app.config.settings import PriceSettings
from app.jobs import Usage


@dataclass(frozen=True, slots=True)
class Likely:
    """What at least eight of ten such jobs cost no less than, or no more."""

    amount: Decimal | None  #: None where nothing is known of the device's time
    charge: Decimal | None  #: by the tariff for tokens; None if there is none


def cost_range(price: PriceSettings, allowed: Size, pace: Pace | None) -> tuple[Likely, Likely]:
    """The least and the most that such a job is likely to cost, by the rules of `app.books.cost`.

    `allowed` has all the output that the job may ask for. It ends as early or late as others did,
    and takes of the device what others took of what is fitted to them. Without others it may
    generate nothing, or all.
    """
    outputs = pace.output_spread if pace else (0.0, 1.0)
    devices = pace.device_spread if pace else (1.0, 1.0)
    low, high = (
        _cost(price, allowed.with_output(output), pace, device)
        for output, device in zip(outputs, devices, strict=True)
    )
    return low, high


def _cost(price: PriceSettings, size: Size, pace: Pace | None, of_fitted: float) -> Likely:
    usage = Usage(round(size.input_tokens), round(size.output_tokens))
    charge = token_charge(price, usage)
    if pace is None and price.per_device_hour:
        return Likely(None, charge)
    device_s = pace.device.of(size) * of_fitted if pace and pace.device else 0.0
    upstream = upstream_cost(price, usage, ()) or Decimal(0)
    return Likely(device_cost(round(1e9 * device_s), price.per_device_hour) + upstream, charge)
