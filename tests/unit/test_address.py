"""Database URLs: what is taken from them, and what is refused without a word of the password."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import ConfigError
from app.store.address import Address


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgres://u:p@h/db", {"host": "h", "user": "u", "password": "p", "dbname": "db"}),
        ("postgresql+psycopg://u@h:6432/db", {"host": "h", "port": "6432"}),
        ("postgresql://u:a%40b%2Fc%25@h/db", {"password": "a@b/c%", "host": "h"}),
        ("postgresql:///db?host=/var/run/postgresql", {"host": "/var/run/postgresql"}),
        ("postgresql://%2Frun%2Fpg/db", {"host": "/run/pg"}),
        ("postgresql://u@[::1]:5433/db", {"host": "::1", "port": "5433"}),
        ("postgresql://h1:5432,h2:5433/db", {"host": "h1,h2", "port": "5432,5433"}),
        ("postgresql://h/db", {"target_session_attrs": "read-write", "connect_timeout": "3"}),
        ("postgresql://h/db?target_session_attrs=any", {"target_session_attrs": "any"}),
        (
            "postgresql://h/db?sslmode=verify-full&sslrootcert=/ca.pem&connect_timeout=9",
            {"sslmode": "verify-full", "sslrootcert": "/ca.pem", "connect_timeout": "9"},
        ),
        ("postgresql://h/db?application_name=mill", {"application_name": "mill"}),
    ],
)
def test_a_url_means_what_it_means_to_psql(url: str, expected: dict[str, str]) -> None:
    address = Address.of(url)

    assert expected.items() <= address.libpq.items()


def test_what_the_url_leaves_open_is_ours_and_what_it_says_stays() -> None:
    said = Address.of("postgresql://h/db?application_name=mill&connect_timeout=9")
    left_open = Address.of("postgresql://h/db")

    named = {"application_name": "gristmill-api", "connect_timeout": "5"}

    assert said.with_defaults(**named).libpq == said.libpq
    assert left_open.with_defaults(**named).libpq == {**left_open.libpq, **named}


def test_settings_in_options_live_beside_ours_and_ours_win() -> None:
    url = (
        "postgresql://h/db?options=-c%20search_path%3Done%2Ctwo%20--work-mem%3D8MB"
        "%20-cLOCK_timeout%3D9%20endpoint%3Dep-1"
    )

    address = Address.of(url).with_settings({"lock_timeout": "3000"})

    assert address.settings == {"search_path": "one,two", "work_mem": "8MB", "lock_timeout": "3000"}
    assert address.options == (
        "endpoint=ep-1 -c search_path=one,two -c work_mem=8MB -c lock_timeout=3000"
    )
    assert address.begin == (
        "BEGIN; SELECT set_config('lock_timeout', '3000', true), "
        "set_config('search_path', 'one,two', true), set_config('work_mem', '8MB', true)"
    )


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z_.]{0,10}", fullmatch=True),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        max_size=4,
    )
)
def test_any_value_of_a_setting_survives_the_way_through_options(settings: dict[str, str]) -> None:
    options = Address({}, settings).options

    assert Address.of("postgresql://h/db?options=" + _percent(options)).settings == settings


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://u:s3cr3t@h:port/db", "port"),
        ("postgresql://u:s3cr3t@x@h/db", "percent-encoded"),
        ("postgresql://u:s3cr3t/x@h/db", "percent-encoded"),
        ("postgresql://u:12/s3cr3t@h/db", "percent-encoded"),
        ("postgresql://u:s3cr3t%zz@h/db", "%"),
        ("postgresql://u:s3cr3t@h/db?pgbouncer=true", "parameter pgbouncer"),
        ("mysql://u:s3cr3t@h/db", "postgresql://"),
        ("s3cr3t", "not a URL"),
        ("", "not a URL"),
    ],
)
def test_a_wrong_url_is_refused_and_its_password_is_not_told(url: str, reason: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Address.of(url)

    assert reason in refusal.value.message
    assert "s3cr3t" not in refusal.value.message


@given(st.text(max_size=20))
def test_no_password_makes_anything_but_an_address_or_a_refusal_that_is_silent(
    password: str,
) -> None:
    secret = "Zq7" + password + "Zq7"
    told = ""
    try:
        Address.of(f"postgresql://u:{secret}@h:5432/db")
    except ConfigError as refusal:
        told = refusal.message

    assert "Zq7" not in told
