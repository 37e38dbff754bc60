"""The broker's URL: what is taken, and a sentence for everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.broker.app import make_app
from app.config.broker_url import for_kombu, problem_in
from app.config.settings import Settings


def connection_of(settings: Settings) -> object:
    with make_app(settings) as app, app.connection_for_write() as connection:
        return connection


@pytest.mark.parametrize(
    ("url", "master"),
    [
        ("redis://redis.internal", ""),
        ("redis://:pass%40word@redis.internal:6379/0", ""),
        ("redis://[::1]:6379/0", ""),
        ("redis://redis_1/0", ""),
        ("redis://mühle.example/0", ""),
        ("rediss://miller:flour@redis.internal:6380/3?ssl_cert_reqs=none", ""),
        ("unix:///run/redis.sock", ""),
        ("unix://miller:flour@/run/redis.sock?db=2", ""),
        ("redis+socket:///run/redis.sock?virtual_host=2", ""),
        ("sentinel://one:26379", "miller"),
        ("sentinel://:flour@one:26379;sentinel://two:26379;sentinel://three/1", "miller"),
    ],
)
def test_the_urls_that_are_documented_are_taken(
    url: str, master: str, make_settings: Callable[..., Settings]
) -> None:
    assert problem_in(url, master) is None
    assert connection_of(make_settings(broker={"url": url, "sentinel_master": master}))


@pytest.mark.parametrize(
    ("url", "master", "says"),
    [
        ("amqp://guest@rabbit//", "", "must begin with redis://"),
        ("redis.internal:6379", "", "must begin with redis://"),
        ("redis+cluster://one:7000", "", "must not be a Redis Cluster"),
        ("rediscluster://one:7000,two:7000", "", "must not be a Redis Cluster"),
        ("redis://one;redis://two", "", "several servers"),
        ("redis://one:6379,two:6379/0", "", "several servers"),
        ("redis://host:port/0", "", "host or port cannot be read"),
        ("redis://:pass/word@host/0", "", "host or port cannot be read"),
        ("redis://:pass#word@host/0", "", "write / as %2F"),
        ("redis://host/db", "", "number of a database"),
        ("redis:///0", "", "names no host"),
        ("redis://host/0?ssl_cert_reqs=none", "", "must begin with rediss://"),
        ("rediss://host/0?ssl_cert_reqs=maybe", "", "must have one of required"),
        ("rediss://host/0?ssl_ca_certs=/no/such.pem", "", "no such file"),
        ("redis://host/0?protocol=3", "", "has protocol"),
        ("redis://host..internal/0", "", "a host that cannot be one"),
        (f"redis://{64 * 'h'}/0", "", "a host that cannot be one"),
        ("redis://$REDIS_HOST/0", "", "a host that cannot be one"),
        ("sentinel://one;sentinel://<two>", "miller", "a host that cannot be one"),
        ("unix://run/redis.sock", "", "after three slashes"),
        ("unix:///run/redis.sock?db=x", "", "number as db"),
        ("sentinel://one:26379", "", "broker.sentinel_master"),
        ("sentinel://one;redis://two", "miller", "each of its parts"),
        ("redis://one", "miller", "must begin with sentinel://"),
    ],
)
def test_a_wrong_url_is_refused_with_what_is_wrong(url: str, master: str, says: str) -> None:
    assert says in str(problem_in(url, master))


def test_what_a_sentence_says_holds_no_password() -> None:
    for url in ("redis://:flour#x@host/db", "rediss://:flour@h/x", "redis://:flour@h:p/0"):
        assert "flour" not in str(problem_in(url, ""))


words = st.sampled_from(
    [
        "redis",
        "rediss",
        "unix",
        "sentinel",
        "redis+socket",
        "://",
        ":",
        "@",
        "/",
        ";",
        ",",
        "?",
        "&",
        "=",
        "#",
        "%",
        "[",
        "]",
        "::1",
        "host",
        "26379",
        "0",
        "db",
        "ssl_cert_reqs",
        "none",
        "\t",
    ]
)


@given(st.one_of(st.text(), st.lists(words, max_size=14).map("".join)))
def test_whatever_is_set_is_refused_by_a_sentence_or_understood_by_kombu(url: str) -> None:
    for master in ("", "miller"):
        if url and problem_in(url, master) is None:
            settings = Settings.model_validate({"broker": {"url": url, "sentinel_master": master}})
            assert connection_of(settings)


def test_every_sentinel_is_asked_with_the_same_user_database_and_encryption() -> None:
    url = for_kombu("sentinel://:flour@one:1;sentinel://two:2/3?ssl_cert_reqs=none")

    assert url == (
        "sentinel://:flour@one:1/3?ssl_cert_reqs=none;sentinel://:flour@two:2/3?ssl_cert_reqs=none"
    )


def test_certificates_that_are_there_are_taken(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()

    assert problem_in(f"rediss://host/0?ssl_ca_certs={quote(str(tmp_path))}/ca.pem", "") is None
