"""Connections need files: as many as the settings say, or a clear refusal at the start."""

from __future__ import annotations

import resource

import pytest

from app.api import connections
from app.api.connections import SPARE_FILES
from app.errors import ConfigError


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The soft and the hard limit on open files."""
    now = [1_024, 4_096]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: now.__setitem__(slice(None), new))
    return now


def test_the_soft_limit_is_raised_to_what_is_needed(limits: list[int]) -> None:
    connections.allow(4_000)

    assert limits == [4_000 + SPARE_FILES, 4_096]


def test_a_soft_limit_that_is_high_enough_is_left_alone(limits: list[int]) -> None:
    connections.allow(500)

    assert limits == [1_024, 4_096]


def test_more_connections_than_the_hard_limit_allows_are_refused(limits: list[int]) -> None:
    with pytest.raises(ConfigError, match="lower it to 4000"):
        connections.allow(10_000)
    assert limits == [1_024, 4_096]
