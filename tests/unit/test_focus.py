"""Usage as FOCUS 1.3 has it: every column by its definition, and nothing lost."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.books.usage import PARTS
from app.cli.focus import COLUMNS, rows_of
from app.cli.usage import csv_of


@dataclass(frozen=True)
class Column:
    kind: str
    may_be_null: bool
    words: tuple[str, ...] = ()


# Column definitions of the Cost and Usage dataset, version 1.3: their feature level, data type, and
# whether they allow nulls, of github.com/FinOps-Open-Cost-and-Usage-Spec/FOCUS_Spec,
# specification/datasets/cost_and_usage (dataset.md at 003443d, whose columns 1.3 has, and
# columns/providername.md at 0cfefac: ProviderName and PublisherName are deprecated in 1.3, and
# mandatory still). Allowed values are those of the columns' own pages.
MANDATORY: Final = {
    "BilledCost": Column("Decimal", False),
    "BillingAccountId": Column("String", False),
    "BillingAccountName": Column("String", True),
    "BillingCurrency": Column("Currency", False),
    "BillingPeriodEnd": Column("Date/Time", False),
    "BillingPeriodStart": Column("Date/Time", False),
    "ChargeCategory": Column("String", False, ("Usage", "Purchase", "Tax", "Credit", "Adjustment")),
    "ChargeClass": Column("String", True, ("Correction",)),
    "ChargeDescription": Column("String", True),
    "ChargePeriodEnd": Column("Date/Time", False),
    "ChargePeriodStart": Column("Date/Time", False),
    "ContractedCost": Column("Decimal", False),
    "EffectiveCost": Column("Decimal", False),
    "HostProviderName": Column("String", False),
    "InvoiceIssuerName": Column("String", False),
    "ListCost": Column("Decimal", False),
    "PricingQuantity": Column("Decimal", True),
    "PricingUnit": Column("Unit", True),
    "ProviderName": Column("String", False),
    "PublisherName": Column("String", False),
    "ServiceCategory": Column("String", False, ("AI and Machine Learning",)),
    "ServiceName": Column("String", False),
    "ServiceProviderName": Column("String", False),
}
OTHERS: Final = {  # recommended, or conditional
    "AllocatedMethodDetails": Column("JSON", True),
    "AllocatedMethodId": Column("String", True),
    "AllocatedResourceId": Column("String", True),
    "AllocatedResourceName": Column("String", True),
    "AllocatedTags": Column("JSON", True),
    "ChargeFrequency": Column("String", False, ("One-Time", "Recurring", "Usage-Based")),
    "ConsumedQuantity": Column("Decimal", True),
    "ConsumedUnit": Column("Unit", True),
    "ContractedUnitPrice": Column("Decimal", True),
    "ListUnitPrice": Column("Decimal", True),
    "PricingCategory": Column("String", True, ("Standard", "Dynamic", "Committed", "Other")),
    "ResourceId": Column("String", True),
    "ResourceName": Column("String", True),
    "ResourceType": Column("String", True),
    "ServiceSubcategory": Column(
        "String",
        False,
        ("AI Platforms", "Bots", "Generative AI", "Machine Learning", "Natural Language Processing",
         "Other (AI and Machine Learning)"),
    ),
    "SkuId": Column("String", True),
    "SkuMeter": Column("String", True),
    "SkuPriceDetails": Column("JSON", True),
    "SkuPriceId": Column("String", True),
    "SubAccountId": Column("String", True),
    "SubAccountName": Column("String", True),
    "Tags": Column("JSON", True),
}  # fmt: skip
OURS: Final = re.compile(r"x_[A-Z][A-Za-z]+")
FORMS: Final = {
    "Decimal": r"-?\d+(\.\d+)?",
    "Currency": r"[A-Z]{3}",
    "Date/Time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
    "Unit": r"Hours",
    "String": r"(?s).+",
    "JSON": r"\{.*\}",
}


def read(answer: dict[str, Any]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_of(COLUMNS, rows_of(answer)), newline="")))


def answered(
    jobs: list[tuple[int, int]], parts: list[int], span: str = "day", **more: Any
) -> dict[str, Any]:
    """Usage of jobs by tenant and device nanoseconds, and of one device."""
    begin = "2027-02-28T00:00:00Z"
    cost = lambda ns: f"{Decimal(ns) * 36 / 10**13:.9f}"  # noqa: E731
    data = [
        {
            "group": {span: begin, "tenant": f"t{tenant}", "model": "=m", "price": "cpu"},
            "rest": False, "jobs": {"completed": 2, "failed": 1}, "input_tokens": 7,
            "cached_tokens": 3, "output_tokens": 5, "device_seconds": ns / 10**9,
            "currency": "EUR", "cost": cost(ns), "upstream_cost": "0",
            "price_per_hour": "12.960000000",
        } | more
        for tenant, ns in jobs
    ]  # fmt: skip
    ns = dict(zip(PARTS, parts, strict=True)) | {"busy": sum(each for _, each in jobs)}
    ns["up"] = sum(ns.values())
    device = {
        "time": begin, "device": "cpu", "price_id": "cpu", "currency": "EUR",
        "price_per_hour": "12.960000000", "seconds": {k: v / 10**9 for k, v in ns.items()},
        "cost": {part: cost(each) for part, each in ns.items()},
    }  # fmt: skip
    by = [span, "tenant", "model", "price"]
    return {"zone": "UTC", "by": by, "data": data, "devices": [device]}


NS = st.integers(0, 10**15)


@given(
    st.lists(st.tuples(st.integers(0, 9), NS), max_size=5, unique_by=lambda job: job[0]),
    st.lists(NS, min_size=len(PARTS) - 1, max_size=len(PARTS) - 1),
    st.sampled_from(["hour", "day"]),
)
def test_every_row_is_as_the_columns_are_defined_and_ratios_add_up_to_one(
    jobs: list[tuple[int, int]], parts: list[int], span: str
) -> None:
    answer = answered(jobs, [*parts, 0], span)

    rows = read(answer)

    columns = MANDATORY | OTHERS
    told = [name for name in COLUMNS if not OURS.fullmatch(name)]
    assert set(MANDATORY) <= set(told) <= set(columns)
    assert told == sorted(told) and list(COLUMNS)[: len(told)] == told  # ours come last
    ratios: defaultdict[str, Decimal] = defaultdict(Decimal)
    for row in rows:
        for name in told:
            column, value = columns[name], row[name]
            assert value or column.may_be_null, name
            assert not value or re.fullmatch(FORMS[column.kind], value), (name, value)
            assert not column.words or not value or value in column.words, name
        assert row["BillingPeriodStart"] <= row["ChargePeriodStart"] < row["ChargePeriodEnd"]
        assert row["ChargePeriodEnd"] <= row["BillingPeriodEnd"] == "2027-03-01T00:00:00Z"
        price, hours = Decimal(row["ListUnitPrice"]), Decimal(row["PricingQuantity"])
        assert abs(price * hours - Decimal(row["ListCost"])) < Decimal("0.00000001")
        [element] = json.loads(row["AllocatedMethodDetails"], parse_float=Decimal)["Elements"]
        ratios[row["SkuPriceId"]] += element["AllocatedRatio"]
    assert set(ratios.values()) <= {1}
    total = sum((Decimal(row["BilledCost"]) for row in rows), Decimal(0))
    up = Decimal(answer["devices"][0]["cost"]["up"])
    assert abs(total - up) <= Decimal("0.000000001") * (len(jobs) + len(PARTS))


def test_jobs_and_what_devices_did_beside_have_rows_and_what_has_no_price_has_none() -> None:
    answer = answered([(1, 10**9), (2, 3 * 10**9)], [10**9, 0, 5 * 10**9, 0, 0, 0])
    answer["data"].append(answer["data"][0] | {"currency": None})
    answer["devices"].append(answer["devices"][0] | {"cost": None})

    rows = read(answer)

    told = [(row["SubAccountId"], row["SkuMeter"], row["BilledCost"]) for row in rows]
    assert told == [
        ("t1", "busy", "0.003600000"), ("t2", "busy", "0.010800000"),
        ("", "load", "0.003600000"), ("", "idle", "0.018000000"),
    ]  # fmt: skip
    assert [row["x_CachedTokens"] for row in rows] == ["3", "3", "", ""]


def test_what_servers_elsewhere_asked_for_has_no_price_of_an_hour() -> None:
    [row, *_] = read(answered([(1, 10**9)], [0] * len(PARTS), upstream_cost="0.001000000"))

    assert row["ListUnitPrice"] == row["ContractedUnitPrice"] == ""


def test_an_answer_that_does_not_tell_all_charges_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="too many models"):
        read(answered([(1, 1)], [0] * len(PARTS), rest=True))
    with pytest.raises(ValueError, match="by hour or day"):
        read(answered([(1, 1)], [0] * len(PARTS)) | {"zone": "Europe/Berlin"})
    with pytest.raises(ValueError, match="by hour or day"):
        read(answered([], [0] * len(PARTS), "month"))
