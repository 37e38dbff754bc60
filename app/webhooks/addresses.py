"""Which addresses a webhook may reach.

Whoever names a URL has this service call it, from inside the operator's network. So an address must
be a public one, or in a network that the operator allows: all others are refused, and a name is
refused for any one of its addresses.

An IPv6 address that carries an IPv4 address is what it carries. Registries:
https://www.iana.org/assignments/iana-ipv4-special-registry
https://www.iana.org/assignments/iana-ipv6-special-registry
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Final

from app.config.settings import WebhookSettings
from app.errors import WebhookRefused
from app.webhooks.urls import HookUrl

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(map(ip_network, texts))


NEVER: Final = _networks(
    "0.0.0.0/8",
    "169.254.0.0/16",  # link-local; services of clouds tell secrets here
    "100.100.100.200/32",
    "168.63.129.16/32",
    "192.0.0.192/32",
    "fd00:ec2::254/128",
    "224.0.0.0/4",
    "255.255.255.255/32",
    "::/128",
    "fe80::/10",
    "ff00::/8",
)
"""What no setting allows: services of clouds for their machines, and what is not one machine."""

_NOT_PUBLIC: Final = _networks(
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "240.0.0.0/4",
    "2001::/23",  # Teredo among others
    "2001:db8::/32",
    "2002::/16",  # 6to4: a relay would unpack it to any address
    "2620:4f:8000::/48",
    "3fff::/20",
)
_PUBLIC_IPV6: Final = ip_network("2000::/3")
_NAT64: Final = ip_network("64:ff9b::/96")
_ISATAP: Final = 0x5EFE


def carried(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, if it does; else itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def is_public(address: Address) -> bool:
    """Whether it is one machine's in the public internet, as far as an address tells."""
    address = carried(address)
    if any(address in network for network in (*NEVER, *_NOT_PUBLIC)):
        return False
    if isinstance(address, IPv6Address):
        is_tunnel = int(address) >> 32 & 0xFDFF_FFFF == _ISATAP
        return address in _PUBLIC_IPV6 and not is_tunnel and address.scope_id is None
    return True


@dataclass(frozen=True, slots=True)
class Reach:
    """Where webhooks may go, by the operator's settings."""

    ports: frozenset[int]  #: of public addresses, over https
    allowed: tuple[Network, ...] = ()  #: not public, and allowed: any port, http as well

    @classmethod
    def of(cls, settings: WebhookSettings) -> Reach:
        return cls(frozenset(settings.ports), tuple(map(ip_network, settings.allow_networks)))

    def check_url(self, url: HookUrl) -> None:
        """Raises `WebhookRefused` for what can be told without asking for its addresses."""
        if not self.allowed:
            self._check_public(url)
        if url.address is not None:
            self.check(url, [url.address])

    def check(self, url: HookUrl, addresses: Sequence[Address]) -> None:
        """Raises `WebhookRefused` unless each of the addresses that it has may be reached."""
        if not addresses:
            raise WebhookRefused("The host of the webhook has no address.", param="webhook_url")
        for address in addresses:
            if not self._is_allowed(address):
                if not is_public(address):
                    raise WebhookRefused(
                        "The host of the webhook is in a network that webhooks may not reach: the "
                        "operator allows internal ones in webhooks.allow_networks.",
                        param="webhook_url",
                    )
                self._check_public(url)

    def _check_public(self, url: HookUrl) -> None:
        if url.scheme != "https":
            raise WebhookRefused("A webhook must be an https:// URL.", param="webhook_url")
        if url.port not in self.ports:
            ports = ", ".join(map(str, sorted(self.ports)))
            raise WebhookRefused(
                f"The port of a webhook must be one of {ports}.", param="webhook_url"
            )

    def _is_allowed(self, address: Address) -> bool:
        address = carried(address)
        if any(address in network for network in NEVER):
            return False
        return any(address in network for network in self.allowed)
