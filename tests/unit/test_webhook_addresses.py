"""Which addresses a webhook may reach: public ones, and what the operator allows."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.settings import WebhookSettings
from app.errors import WebhookRefused
from app.webhooks.addresses import NEVER, Address, Reach, is_public
from app.webhooks.urls import parse_url

STRICT = Reach(frozenset({443, 8443}))

PRIVATE = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
    "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32",
]  # fmt: skip
PRIVATE_IPV6 = [
    "::/128", "::1/128", "::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32",
    "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
    "4000::/3", "8000::/1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001::200e"]


@st.composite
def within(draw: st.DrawFn, networks: list[str]) -> Address:
    """An address of one of these networks."""
    network = ip_network(draw(st.sampled_from(networks)))
    assert isinstance(network, IPv4Network | IPv6Network)
    return network[draw(st.integers(0, network.num_addresses - 1))]


def spellings(four: IPv4Address) -> list[IPv6Address]:
    """Addresses by which an IPv4 address can be reached over IPv6."""
    number = int(four)
    return [
        IPv6Address(0xFFFF << 32 | number),  # mapped
        IPv6Address((0x64_FF9B << 96) | number),  # NAT64
    ]


@given(within(PRIVATE))
def test_no_address_that_is_not_public_is_reached_in_any_form(address: Address) -> None:
    assert isinstance(address, IPv4Address)
    for form in (address, *spellings(address)):
        assert not is_public(form), form
        with pytest.raises(WebhookRefused):
            STRICT.check(parse_url("https://example.com/"), [form])


@given(within(PRIVATE_IPV6))
def test_no_ipv6_address_that_is_not_public_is_reached(address: Address) -> None:
    assert not is_public(address) or is_public(IPv6Address(int(address)).ipv4_mapped or address)


@given(st.integers(0, 2**32 - 1))
def test_an_ipv4_address_is_judged_alike_in_every_form(number: int) -> None:
    four = IPv4Address(number)

    assert {is_public(six) for six in spellings(four)} == {is_public(four)}
    # and what unpacks it on the way is never public
    assert not is_public(IPv6Address(0x2002 << 112 | number << 80))
    assert not is_public(IPv6Address(0x2A00_1450 << 96 | 0x5EFE << 32 | number))


@given(st.integers(0, 2**32 - 1))
def test_what_python_does_not_take_for_global_is_not_reached(number: int) -> None:
    four = IPv4Address(number)

    assert four.is_global or not is_public(four)
    assert not (four.is_multicast or four.is_link_local or four.is_loopback) or not is_public(four)


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_are_reached_over_https(text: str) -> None:
    STRICT.check(parse_url("https://example.com/"), [ip_address(text)])
    STRICT.check(parse_url("https://example.com:8443/"), [ip_address(text)])
    for url in ("http://example.com/", "https://example.com:6379/"):
        with pytest.raises(WebhookRefused):
            STRICT.check(parse_url(url), [ip_address(text)])


def test_a_name_is_refused_for_any_one_of_its_addresses() -> None:
    addresses = [ip_address("93.184.215.14"), ip_address("10.0.0.1")]

    for some in (addresses, addresses[::-1], []):
        with pytest.raises(WebhookRefused):
            STRICT.check(parse_url("https://example.com/"), some)


def test_networks_that_the_operator_allows_are_reached_over_http_on_any_port() -> None:
    reach = Reach.of(WebhookSettings(allow_networks=("10.1.0.0/16", "fd12::/16")))

    reach.check_url(parse_url("http://10.1.2.3:9000/"))
    reach.check_url(parse_url("http://internal.example:9000/"))  # its address is not known yet
    reach.check(parse_url("http://internal.example:9000/"), [ip_address("10.1.2.3")])
    reach.check(parse_url("http://internal.example:9000/"), [ip_address("fd12::1")])
    reach.check(parse_url("http://internal.example:9000/"), [ip_address("::ffff:10.1.2.3")])
    for address in ("10.2.0.1", "127.0.0.1", "93.184.215.14"):  # http to the internet
        with pytest.raises(WebhookRefused):
            reach.check(parse_url("http://internal.example:9000/"), [ip_address(address)])


@given(within([str(network) for network in NEVER]))
def test_no_setting_opens_what_tells_a_machine_its_secrets(address: Address) -> None:
    reach = Reach(frozenset({443}), (ip_network("0.0.0.0/0"), ip_network("::/0")))

    with pytest.raises(WebhookRefused):
        reach.check(parse_url("https://example.com/"), [address])


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "https://example.com:22/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:169.254.169.254]/",
        "https://169.254.169.254/latest/meta-data/",
    ],
)
def test_what_can_be_told_from_the_url_is_refused_when_it_is_submitted(url: str) -> None:
    with pytest.raises(WebhookRefused):
        STRICT.check_url(parse_url(url))
