"""Who may speak to what listens here: rules for the heads of HTTP requests, pure.

A web page that somebody of this machine has open can make the browser ask any address, loopback
too. Two things tell its requests from those of our own callers, and no page can forge them:

- `Host`. By giving its own name our address (DNS rebinding), a page becomes of one origin with us;
  its name then stands there. An IP address or `localhost` can be nobody's name.
- `Sec-Fetch-Site`, or `Origin` from an older browser: where the page is from.
  https://www.w3.org/TR/fetch-metadata/, https://www.rfc-editor.org/rfc/rfc6454
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from app.config.host import is_address, is_localhost

_HOST: Final = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]@/?#\s]+))(?::(\d*))?")

HEADERS: Final = {
    # No page of another origin gets an answer as an image, a script, a frame or a window.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
"""On every answer."""


@dataclass(frozen=True, slots=True)
class Refusal:
    status: HTTPStatus
    detail: str


def refusal(
    method: str, headers: Mapping[str, str], allowed_hosts: Sequence[str], setting: str
) -> Refusal | None:
    """Why a request is not served, if it is not. `headers` by names in any case; `setting` is what
    `allowed_hosts` is called."""
    host = headers.get("Host", "")  # without one it is HTTP/1.0, which no browser speaks
    if host and not _is_ours(_name(host), allowed_hosts):
        return Refusal(
            HTTPStatus.MISDIRECTED_REQUEST,
            f"The Host of the request is neither an address, nor localhost, nor in {setting}: add "
            "the name to that setting if it is this server's.",
        )
    if _is_of_a_foreign_page(headers, allowed_hosts) and not _follows_a_link(method, headers):
        return Refusal(
            HTTPStatus.FORBIDDEN,
            "Web pages of other origins may not use this. Where a proxy serves the page, add its "
            f"host to {setting}.",
        )
    return None


def _name(host: str) -> str:
    """`example.com` of `Example.com.:8000`; empty if it is no host."""
    found = _HOST.fullmatch(host.lower())
    return (found[1] or found[2]).removesuffix(".") if found else ""


def _is_ours(name: str, allowed_hosts: Sequence[str]) -> bool:
    return is_address(name) or is_localhost(name) or _is_allowed(name, allowed_hosts)


def _is_allowed(name: str, allowed_hosts: Sequence[str]) -> bool:
    """Whether the setting has the name, or a `*.` before what it ends with."""
    return any(
        name == allowed.lower() or (allowed.startswith("*.") and name.endswith(allowed[1:].lower()))
        for allowed in allowed_hosts
        if name
    )


def _is_of_a_foreign_page(headers: Mapping[str, str], allowed_hosts: Sequence[str]) -> bool:
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    scheme, _, place = (origin or "").lower().partition("://")
    if _is_allowed(_name(place), allowed_hosts):
        return False
    if site is not None:
        return site not in ("same-origin", "none")
    if origin is None:
        return False
    port = {"http": ":80", "https": ":443"}.get(scheme, "")
    host = headers.get("Host", "").lower()
    return not host or place.removesuffix(port) != host.removesuffix(port)


def _follows_a_link(method: str, headers: Mapping[str, str]) -> bool:
    """A page may lead to ours, as to /docs: it reads nothing of what then fills the window."""
    return (
        method == "GET"
        and headers.get("Sec-Fetch-Mode") == "navigate"
        and headers.get("Sec-Fetch-Dest") == "document"
    )
