"""The URL of a webhook: read strictly, so that what is checked is what is called."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import RequestError
from app.webhooks.urls import MAX_URL, parse_url


@pytest.mark.parametrize(
    ("text", "normal", "host", "port", "path"),
    [
        ("https://example.com", "https://example.com/", "example.com", 443, "/"),
        ("HTTPS://EXAMPLE.com:443/A?b=C", "https://example.com/A?b=C", "example.com", 443,
         "/A?b=C"),
        ("https://example.com:8443/x", "https://example.com:8443/x", "example.com", 8443, "/x"),
        ("https://example.com?x=1", "https://example.com/?x=1", "example.com", 443, "/?x=1"),
        ("https://example.com./x", "https://example.com/x", "example.com", 443, "/x"),
        ("http://10.0.0.1:80/", "http://10.0.0.1/", "10.0.0.1", 80, "/"),
        ("https://[2001:DB8::1]:444/", "https://[2001:db8::1]:444/", "2001:db8::1", 444, "/"),
        ("https://xn--mhle-0ra.example/", "https://xn--mhle-0ra.example/", "xn--mhle-0ra.example",
         443, "/"),
        ("https://h/a%20b/@;c=(1)*'!$,~[]", "https://h/a%20b/@;c=(1)*'!$,~[]", "h", 443,
         "/a%20b/@;c=(1)*'!$,~[]"),
    ],
)  # fmt: skip
def test_a_url_is_read_into_what_is_called(
    text: str, normal: str, host: str, port: int, path: str
) -> None:
    url = parse_url(text)

    assert (str(url), url.host, url.port, url.path) == (normal, host, port, path)
    assert parse_url(str(url)) == url


@pytest.mark.parametrize(
    "text",
    [
        "example.com/hook",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "https:/example.com",
        "https://",
        "https:///hook",
        "https://user:password@example.com/",
        "https://example.com@169.254.169.254/",
        "https://example.com#@169.254.169.254/",
        "https://example.com\\@169.254.169.254/",
        "https://example.com/#fragment",
        "https://exa mple.com/",
        "https://example.com/a b",
        "https://example.com/\r\nHost: other",
        "https://example.com\t/",
        "https://exämple.com/",
        "https://ſ.com/",  # a letter that is an s in lower case
        "https://\u212a.com/",  # and one that is a k
        "https://example.com/ä",
        "https://example.com:0/",
        "https://example.com:65536/",
        "https://example.com:/",
        "https://example.com:-1/",
        "https://example..com/",
        "https://.example.com/",
        "https://-example.com/",
        f"https://{'a' * 64}.com/",
        f"https://example.com/{'a' * MAX_URL}",
        "https://\ud800.com/",
        "https://example.com/\0",
        # spellings of 127.0.0.1 and 169.254.169.254 that some readers take
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.1/",
        "https://017700000001/",
        "https://0177.0.0.1/",
        "https://127.1/",
        "https://127.0.0.1./",
        "https://0xA9FEA9FE/",
        "https://169.254.43518/",
        "https://example.0x/",
        "https://[::1/",
        "https://[::1%25eth0]/",
        "https://[fe80::1%eth0]/",
        "https://[::ffff:1.2.3]/",
        "https://[1:2]/",
    ],
)
def test_what_readers_of_urls_could_take_for_different_things_is_refused(text: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_url(text)

    assert refused.value.param == "webhook_url"
    assert text not in refused.value.message.replace("https://example.com/hook", "")


@given(st.integers(0, 2**32 - 1))
def test_every_ipv4_address_has_one_spelling(number: int) -> None:
    address = IPv4Address(number)

    assert parse_url(f"https://{address}/").address == address
    for other in (str(number), hex(number), f"0{number:o}", f"{address}.", f"0{address}"):
        with pytest.raises(RequestError):
            parse_url(f"https://{other}/")


@given(st.integers(0, 2**128 - 1))
def test_every_ipv6_address_is_read_as_what_it_is(number: int) -> None:
    url = parse_url(f"https://[{IPv6Address(number).exploded}]/")

    assert url.address == IPv6Address(number)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_and_reading_again_changes_nothing(text: str) -> None:
    for given_ in (text, f"https://{text}", f"https://example.com/{text}"):
        try:
            url = parse_url(given_)
        except RequestError:
            continue
        assert parse_url(str(url)) == url
        assert str(url).isascii() and " " not in str(url)
