"""The rate of a tenant's calls: those that submit are counted, and told how many are left.

While Redis is away nobody is refused for it: jobs are bounded by what is in Postgres all the same.
Headers are those of draft-ietf-httpapi-ratelimit-headers-10.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from fastapi import Request

from app.broker.rates import WINDOW_S, Rate
from app.errors import RateLimited, Unavailable

if TYPE_CHECKING:
    from app.api.services import Services

log = logging.getLogger(__name__)

POLICY: Final = "requests"


async def count(request: Request, tenant: str) -> None:
    """Raises `RateLimited` if this call of the tenant is one too many."""
    here: Services = request.app.state.services
    try:
        rate = await _rate(here, tenant)
    except Unavailable as error:
        log.warning("A call was not counted: %s", error, extra={"action": "rate_unknown"})
        return
    if rate is None:
        return
    request.state.rate = rate
    if rate.is_over:
        raise RateLimited(
            f"Your limit is {rate.limit} calls a minute (max_requests_per_minute).",
            limit="max_requests_per_minute",
            retry_after=rate.reset_s,
        )


async def _rate(here: Services, tenant: str) -> Rate | None:
    tenants = here.submitter.tenants
    known = tenants.known(tenant)
    if known is None:
        known = await here.read(tenants.of, tenant)
    if known.max_requests_per_minute is None:
        return None
    return await here.read(here.rates.hit, tenant, known.max_requests_per_minute)


def headers_of(request: Request) -> list[tuple[bytes, bytes]]:
    """What an answer tells of its caller's limit, if there is one."""
    rate: Rate | None = getattr(request.state, "rate", None)
    if rate is None:
        return []
    policy = f'"{POLICY}";q={rate.limit};w={WINDOW_S}'
    state = f'"{POLICY}";r={rate.remaining};t={rate.reset_s}'
    return [(b"ratelimit-policy", policy.encode()), (b"ratelimit", state.encode())]
