"""Usage as FOCUS has it, the FinOps Open Cost and Usage Specification: version 1.3.

A row is a charge for device time: of the jobs of a day (or hour), model, tenant and price, or of
what devices did beside: load, idle, waste, overhead. All rows of a price are split off the time
that its devices were up, by the time itself; their ratios add up to 1 exactly.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from app.books.shares import share

BY: Final = ("tenant", "model", "price")
"""What usage has to be asked by, beside its hours or days."""

COLUMNS: Final = (
    "AllocatedMethodDetails", "AllocatedMethodId", "AllocatedResourceId", "AllocatedResourceName",
    "AllocatedTags", "BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency",
    "BillingPeriodEnd", "BillingPeriodStart", "ChargeCategory", "ChargeClass", "ChargeDescription",
    "ChargeFrequency", "ChargePeriodEnd", "ChargePeriodStart", "ConsumedQuantity", "ConsumedUnit",
    "ContractedCost", "ContractedUnitPrice", "EffectiveCost", "HostProviderName",
    "InvoiceIssuerName", "ListCost", "ListUnitPrice", "PricingCategory", "PricingQuantity",
    "PricingUnit", "ProviderName", "PublisherName", "ResourceId", "ResourceName", "ResourceType",
    "ServiceCategory", "ServiceName", "ServiceProviderName", "ServiceSubcategory", "SkuId",
    "SkuMeter", "SkuPriceDetails", "SkuPriceId", "SubAccountId", "SubAccountName", "Tags",
    "x_CachedTokens", "x_InputTokens", "x_Jobs", "x_OutputTokens",
)  # fmt: skip

METHOD: Final = "DeviceTime"
BESIDE: Final = ("load", "idle", "waste", "overhead")
"""What is computed for jobs that are settled later is charged with them."""
RATIOS: Final = 10**12
"""Ratios have so many parts, and add up to all of them."""

WHO: Final = "Gristmill"
HOUR_S: Final = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """Device time and what it cost."""

    begin: datetime
    end: datetime
    currency: str
    price_id: str
    unit_price: str | None  #: per device and hour; None where servers elsewhere asked for a part
    seconds: float
    cost: str
    meter: str
    device: str | None = None
    model: str | None = None
    tenant: str | None = None
    counts: Mapping[str, int]

    @property
    def pool(self) -> tuple[object, ...]:
        """What it is split off."""
        return self.begin, self.price_id, self.currency


def rows_of(answer: Mapping[str, Any]) -> Iterator[list[object]]:
    """Rows for an answer of GET /v1/usage by a span and `BY`, in UTC. What has no price has none.

    Raises `ValueError` for an answer by something else, and for one that does not tell all apart.
    """
    span, *by = answer["by"]
    if span not in ("hour", "day") or tuple(by) != BY or answer["zone"] != "UTC":
        raise ValueError("FOCUS rows are made of usage by hour or day, tenant, model and price.")
    length = timedelta(hours=1) if span == "hour" else timedelta(days=1)
    charges = [*_of_jobs(answer, span, length), *_of_devices(answer, length)]
    ratios = _ratios(charges)
    for charge, ratio in zip(charges, ratios, strict=True):
        told = _row(charge, ratio)
        yield [told[column] for column in COLUMNS]


def _of_jobs(answer: Mapping[str, Any], span: str, length: timedelta) -> Iterator[Charge]:
    for row in answer["data"]:
        group = row["group"]
        if row["rest"]:
            raise ValueError("There are too many models, tenants and prices for one answer.")
        if row["currency"] is None:
            continue
        begin = datetime.fromisoformat(group[span]).astimezone(UTC)
        yield Charge(
            begin=begin,
            end=begin + length,
            currency=row["currency"],
            price_id=group["price"],
            unit_price=None if Decimal(row["upstream_cost"]) else row["price_per_hour"],
            seconds=row["device_seconds"],
            cost=row["cost"],
            meter="busy",
            model=group["model"],
            tenant=group["tenant"],
            counts={
                "x_Jobs": sum(row["jobs"].values()),
                "x_InputTokens": row["input_tokens"],
                "x_CachedTokens": row["cached_tokens"],
                "x_OutputTokens": row["output_tokens"],
            },
        )


def _of_devices(answer: Mapping[str, Any], length: timedelta) -> Iterator[Charge]:
    for row in answer["devices"]:
        if row["cost"] is None:
            continue
        begin = datetime.fromisoformat(row["time"]).astimezone(UTC)
        for part in BESIDE:
            if row["seconds"][part]:
                yield Charge(
                    begin=begin,
                    end=begin + length,
                    currency=row["currency"],
                    price_id=row["price_id"],
                    unit_price=row["price_per_hour"],
                    seconds=row["seconds"][part],
                    cost=row["cost"][part],
                    meter=part,
                    device=row["device"],
                    counts={},
                )


def _ratios(charges: Sequence[Charge]) -> list[Decimal]:
    """Of each charge, the part of all that its pool is split into."""
    pools: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for place, charge in enumerate(charges):
        pools[charge.pool].append(place)
    ratios = [Decimal(0)] * len(charges)
    for places in pools.values():
        weights = [max(0, round(charges[place].seconds * 10**9)) for place in places]
        for place, parts in zip(places, share(RATIOS, weights), strict=True):
            ratios[place] = Decimal(parts) / RATIOS
    return ratios


def _row(charge: Charge, ratio: Decimal) -> Mapping[str, object]:
    hours = f"{Decimal(str(charge.seconds)) / HOUR_S:.12f}"
    who = charge.model or charge.device
    details = {
        "Elements": [
            {
                "AllocatedRatio": float(ratio),
                "UsageUnit": "Seconds",
                "UsageQuantity": charge.seconds,
            }
        ]
    }
    month = charge.begin.replace(day=1, hour=0)
    return {
        "AllocatedMethodDetails": json.dumps(details),
        "AllocatedMethodId": METHOD,
        "AllocatedResourceId": who,
        "AllocatedResourceName": who,
        "AllocatedTags": None,
        "BilledCost": charge.cost,
        "BillingAccountId": WHO,
        "BillingAccountName": WHO,
        "BillingCurrency": charge.currency,
        "BillingPeriodEnd": _stamp((month + timedelta(days=32)).replace(day=1)),
        "BillingPeriodStart": _stamp(month),
        "ChargeCategory": "Usage",
        "ChargeClass": None,
        "ChargeDescription": f"Device time: {charge.meter}, {who}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": _stamp(charge.end),
        "ChargePeriodStart": _stamp(charge.begin),
        "ConsumedQuantity": hours,
        "ConsumedUnit": "Hours",
        "ContractedCost": charge.cost,
        "ContractedUnitPrice": charge.unit_price,
        "EffectiveCost": charge.cost,
        "HostProviderName": WHO,
        "InvoiceIssuerName": WHO,
        "ListCost": charge.cost,
        "ListUnitPrice": charge.unit_price,
        "PricingCategory": "Standard",
        "PricingQuantity": hours,
        "PricingUnit": "Hours",
        "ProviderName": WHO,
        "PublisherName": WHO,
        "ResourceId": charge.device or charge.price_id,
        "ResourceName": charge.device,
        "ResourceType": "Device",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": WHO,
        "ServiceProviderName": WHO,
        "ServiceSubcategory": "AI Platforms",
        "SkuId": charge.price_id,
        "SkuMeter": charge.meter,
        "SkuPriceDetails": None,
        "SkuPriceId": charge.price_id,
        "SubAccountId": charge.tenant,
        "SubAccountName": charge.tenant,
        "Tags": json.dumps({"model": charge.model} if charge.model else {}),
        **dict.fromkeys(("x_CachedTokens", "x_InputTokens", "x_Jobs", "x_OutputTokens")),
        **charge.counts,
    }


def _stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
