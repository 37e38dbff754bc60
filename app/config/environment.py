"""Environment variables that somebody else has set under our names."""

from __future__ import annotations

import re
from typing import Final

_LINK: Final = re.compile(
    r"[A-Z0-9]+(_[A-Z0-9]+)*_"
    r"(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_ADDRESS: Final = re.compile(r"(tcp|udp|sctp)://")


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes, or Docker's links, set this variable for a service of such a name.

    For a service `gristmill-api` every pod of the namespace gets GRISTMILL_API_SERVICE_HOST,
    GRISTMILL_API_PORT=tcp://10.0.0.1:8000, GRISTMILL_API_PORT_8000_TCP_ADDR and their like.
    https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    if name.endswith("_PORT") and _ADDRESS.match(value):
        return True
    return _LINK.fullmatch(name) is not None
