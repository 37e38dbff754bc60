"""Who is told Flower's metrics: Flower itself would tell whoever asks."""

from __future__ import annotations

import base64
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.broker.flower import unknown_scraper

USERS = ("me:secret", "prometheus:pässword")


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_whoever_has_a_password_is_told() -> None:
    for user in USERS:
        assert unknown_scraper(basic(user), USERS, False) is None
        assert unknown_scraper(basic(user).replace("Basic", "basic"), USERS, True) is None


def test_on_the_loopback_address_without_passwords_all_are_told() -> None:
    assert unknown_scraper(None, (), False) is None


@pytest.mark.parametrize(
    "header",
    [None, "", "Basic", "Basic !", basic(""), basic("me"), basic("me:secre"), basic("me:secret "),
     "Bearer me:secret", "me:secret", "Basic é"],
)  # fmt: skip
def test_nobody_else_is_told(header: str | None) -> None:
    for users, has_login in ((USERS, False), ((), True)):
        refused = unknown_scraper(header, users, has_login)
        assert refused is not None and refused.status is HTTPStatus.UNAUTHORIZED


@given(st.text())
def test_no_header_is_an_error(header: str) -> None:
    assert unknown_scraper(header, USERS, False) is not None
