"""One attempt against receivers that do everything wrong: nothing is reached that should not be,
and nothing keeps it for long."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from app.webhooks.addresses import Address, Reach
from app.webhooks.post import Outcome, Postman, Resolve, SystemResolver
from app.webhooks.urls import HookUrl, parse_url

LOCAL = Reach(frozenset({443}), (ip_network("127.0.0.0/8"),))
BODY = b'{"id":"evt_1"}'
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Receiver:
    """A server that notes what it is sent."""

    def __init__(self, answer: Serve) -> None:
        self.port = 0
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self._answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            self.bodies.append(await reader.readexactly(len(BODY)))
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def says(text: str) -> Serve:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text.encode())
        await writer.drain()

    return answer


OK = says("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@asynccontextmanager
async def receiving(
    answer: Serve, context: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    receiver = Receiver(answer)
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=context)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()


def names(*answers: Sequence[str]) -> tuple[Resolve, list[str]]:
    """A resolver that answers in turn, and what it was asked for."""
    turns, asked = itertools.cycle(answers), []

    async def resolve(host: str, _: int) -> list[Address]:
        asked.append(host)
        return [ip_address(each) for each in next(turns)]

    return resolve, asked


def post(
    url: str,
    resolve: Resolve | None = None,
    *,
    reach: Reach = LOCAL,
    timeout_s: float = 30.0,
    context: ssl.SSLContext | None = None,
) -> Awaitable[Outcome]:
    resolve = resolve or names(["127.0.0.1"])[0]
    postman = Postman(reach, timeout_s, resolve, context)
    return postman.post(parse_url(url), {"webhook-id": "evt_1"}, BODY)


def test_an_event_arrives_as_it_is_with_its_headers_and_the_name_in_host() -> None:
    async def play() -> tuple[Outcome, Receiver]:
        async with receiving(OK) as receiver:
            return await post(f"http://mill.example:{receiver.port}/hook?a=b"), receiver

    outcome, receiver = asyncio.run(play())

    assert outcome.is_delivered and outcome.status == 200
    [head], [body] = receiver.heads, receiver.bodies
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /hook?a=b HTTP/1.1"
    assert f"Host: mill.example:{receiver.port}" in lines
    assert "webhook-id: evt_1" in lines and "Content-Type: application/json" in lines
    assert body == BODY


@pytest.mark.parametrize("status", [201, 202, 204, 299])
def test_every_2xx_is_success(status: int) -> None:
    assert answered(f"HTTP/1.1 {status} Fine\r\nContent-Length: 0\r\n\r\n").is_delivered


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (301, "redirect"), (302, "redirect"), (307, "redirect"), (308, "redirect"),
        (400, "refused_by_receiver"), (404, "refused_by_receiver"), (410, "refused_by_receiver"),
        (429, "refused_by_receiver"), (500, "refused_by_receiver"), (599, "refused_by_receiver"),
    ],
)  # fmt: skip
def test_all_else_is_failure_and_410_says_so(status: int, error: str) -> None:
    outcome = answered(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n")

    assert (outcome.status, outcome.error) == (status, error)
    assert outcome.is_gone == (status == 410)


def answered(text: str, **given: float) -> Outcome:
    async def play() -> Outcome:
        async with receiving(says(text)) as receiver:
            return await post(f"http://mill.example:{receiver.port}/", **given)  # type: ignore[arg-type]

    return asyncio.run(play())


def test_a_redirect_to_the_metadata_service_is_not_followed() -> None:
    async def play() -> tuple[Outcome, Receiver, Receiver]:
        async with receiving(OK) as secret:
            elsewhere = f"http://127.0.0.1:{secret.port}/latest/meta-data/"
            redirect = f"HTTP/1.1 302 Found\r\nLocation: {elsewhere}\r\nContent-Length: 0\r\n\r\n"
            async with receiving(says(redirect)) as receiver:
                return await post(f"http://a.example:{receiver.port}/"), receiver, secret

    outcome, receiver, secret = asyncio.run(play())

    assert (outcome.status, outcome.error) == (302, "redirect")
    assert len(receiver.heads) == 1 and not secret.heads


def test_a_name_that_answers_otherwise_a_moment_later_leads_nowhere_else() -> None:
    async def play() -> tuple[list[Outcome], Receiver, list[str]]:
        async with receiving(OK) as receiver:
            # the first answer is a network that is allowed, the second one is the metadata service
            resolve, asked = names(["127.0.0.1"], ["169.254.169.254"], ["127.0.0.1", "10.0.0.1"])
            url = f"http://rebinding.example:{receiver.port}/"
            return [await post(url, resolve) for _ in range(3)], receiver, asked

    outcomes, receiver, asked = asyncio.run(play())

    # each attempt asks once, and goes to what was checked
    assert [outcome.error for outcome in outcomes] == [None, "address_refused", "address_refused"]
    assert asked == ["rebinding.example"] * 3
    assert len(receiver.heads) == 1


@pytest.mark.parametrize("failure", [OSError("no such name"), UnicodeError("label too long")])
def test_a_name_that_cannot_be_resolved_is_not_called(failure: Exception) -> None:
    async def resolve(_: str, __: int) -> list[Address]:
        raise failure

    async def play() -> tuple[Outcome, Receiver]:
        async with receiving(OK) as receiver:
            return await post(f"http://localhost:{receiver.port}/", resolve), receiver

    outcome, receiver = asyncio.run(play())

    assert outcome.error == "not_resolved" and not receiver.heads


def test_the_systems_resolver_is_held_to_the_same() -> None:
    async def play() -> tuple[Outcome, Receiver]:
        resolver = SystemResolver()
        async with receiving(OK) as receiver:
            url = f"https://localhost:{receiver.port}/"
            reach = Reach(frozenset({receiver.port}))
            outcome = await post(url, resolver, reach=reach)
        resolver.close()
        return outcome, receiver

    outcome, receiver = asyncio.run(play())

    assert outcome.error == "address_refused" and not receiver.heads


async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A head that never ends, a byte now and then."""
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        writer.write(b"a")
        await writer.drain()
        await asyncio.sleep(0.01)


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


@pytest.mark.parametrize("answer", [drip, silent])
def test_a_receiver_that_drips_or_says_nothing_is_left_after_the_deadline(answer: Serve) -> None:
    async def play() -> Outcome:
        async with receiving(answer) as receiver:
            return await post(f"http://slow.example:{receiver.port}/", timeout_s=0.3)

    assert asyncio.run(play()).error == "timeout"


def test_a_name_whose_servers_are_silent_is_left_after_the_deadline() -> None:
    async def resolve(_: str, __: int) -> list[Address]:
        await asyncio.Event().wait()
        raise AssertionError

    async def play() -> Outcome:
        return await post("https://silent.example/", resolve, timeout_s=0.1)

    assert asyncio.run(play()).error == "timeout"


async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A body without end."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    while True:
        writer.write(b"a" * 65_536)
        await writer.drain()


async def huge_head(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A head without end, as fast as it goes."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: " + b"a" * 65_536 + b"\r\n")
        await writer.drain()


async def interim(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Promises of an answer without end."""
    while True:
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("answer", "errors"),
    [
        (endless, {None}),  # its status is what counts; its body is not read
        (says("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nx"), {None}),
        (says("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhal"), {None}),  # cut off in its body
        (huge_head, {"bad_answer"}),
        (interim, {"timeout", "bad_answer"}),
        (says("HTTP/1.1 200 OK\r\nContent-"), {"bad_answer", "cut_off"}),  # cut off in its head
        (says(""), {"bad_answer", "cut_off"}),
        (says("220 mail.example ESMTP\r\n"), {"bad_answer"}),
        (says("HTTP/1.1 999999 Odd\r\n\r\n"), {"bad_answer"}),
        (says("HTTP/1.1 200 OK\r\nContent-Length: no\r\n\r\n"), {"bad_answer"}),
        (says("\0" * 1000), {"bad_answer", "cut_off"}),
    ],
)
def test_an_answer_that_is_huge_endless_broken_or_cut_off_does_no_harm(
    answer: Serve, errors: set[str | None]
) -> None:
    async def play() -> Outcome:
        async with receiving(answer) as receiver:
            return await post(f"http://odd.example:{receiver.port}/", timeout_s=2.0)

    assert asyncio.run(play()).error in errors


def test_a_port_where_nobody_listens_is_a_failure_like_any_other() -> None:
    async def play() -> Outcome:
        async with receiving(OK) as receiver:
            port = receiver.port
        return await post(f"http://nobody.example:{port}/")

    assert asyncio.run(play()).error == "not_connected"


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("120", 120, 120),
        ("0", 0, 0),
        (timedelta(hours=1), 3_000, 3_601),
        (timedelta(hours=-1), 0, 0),
    ],
    ids=["seconds", "none", "a time to come", "a time that was"],
)
def test_a_receiver_may_say_when_to_come_again(
    header: str | timedelta, least: float, most: float
) -> None:
    if isinstance(header, timedelta):
        header = format_datetime(datetime.now(UTC) + header, usegmt=True)
    text = f"HTTP/1.1 503 Later\r\nRetry-After: {header}\r\nContent-Length: 0\r\n\r\n"
    outcome = answered(text)

    assert outcome.retry_after_s is not None and least <= outcome.retry_after_s <= most


@pytest.mark.parametrize("header", ["soon", "-5", "1e9", "٣", "9" * 80, "Mon, 99 Foo 2026", ""])
def test_what_it_says_otherwise_is_nothing(header: str) -> None:
    text = f"HTTP/1.1 503 Later\r\nRetry-After: {header}\r\nContent-Length: 0\r\n\r\n"

    assert answered(text).retry_after_s is None


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of mill.example, which signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mill.example")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("mill.example")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "mill.pem"
    pem = serialization.Encoding.PEM
    file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(pem)
    )
    return file


def over_tls(
    url: Callable[[int], str], certificate: Path, *, trusted: bool
) -> tuple[Outcome, list[str | None]]:
    asked: list[str | None] = []
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    server.sni_callback = lambda _, name, __: asked.append(name)
    client = ssl.create_default_context(cafile=certificate) if trusted else None

    async def play() -> Outcome:
        async with receiving(OK, server) as receiver:
            return await post(url(receiver.port), context=client)

    return asyncio.run(play()), asked


def test_the_name_is_what_tls_asks_for_though_the_address_is_pinned(certificate: Path) -> None:
    outcome, asked = over_tls(
        lambda port: f"https://mill.example:{port}/", certificate, trusted=True
    )

    assert outcome.is_delivered and asked == ["mill.example"]


@pytest.mark.parametrize(
    ("host", "trusted"), [("mill.example", False), ("other.example", True), ("127.0.0.1", True)]
)
def test_a_receiver_that_cannot_show_who_it_is_gets_nothing(
    certificate: Path, host: str, trusted: bool
) -> None:
    outcome, _ = over_tls(lambda port: f"https://{host}:{port}/", certificate, trusted=trusted)

    assert (outcome.status, outcome.error) == (None, "tls_failed")


def test_a_url_that_is_an_address_is_called_without_asking() -> None:
    async def play() -> tuple[Outcome, list[str]]:
        resolve, asked = names(["10.0.0.1"])
        async with receiving(OK) as receiver:
            return await post(f"http://127.0.0.1:{receiver.port}/", resolve), asked

    outcome, asked = asyncio.run(play())

    assert outcome.is_delivered and asked == []


def test_the_url_is_never_read_a_second_time() -> None:
    url = parse_url("https://example.com:8443/x")

    assert isinstance(url, HookUrl) and (url.host, url.port) == ("example.com", 8443)
