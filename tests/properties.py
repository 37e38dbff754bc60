"""`make properties`: each property with TIMES as many examples as in the suite, drawn by chance.

The suite itself tries the same examples on each machine, so that what it says is about the code.
"""

from __future__ import annotations

import os
from typing import Any, Final

import hypothesis
import pytest

TIMES: Final = int(os.environ.get("TIMES", "20"))


def pytest_configure() -> None:
    """After conftest.py, before any test is imported and takes the profile's settings."""
    hypothesis.settings.register_profile(
        "by chance", parent=hypothesis.settings.default, derandomize=False, print_blob=True
    )
    hypothesis.settings.load_profile("by chance")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("hypothesis"):
            item.add_marker(pytest.mark.timeout(0))
            _multiply(item)


def _multiply(item: Any) -> None:
    if item.cls is not None and hasattr(item.cls, "settings"):  # a state machine
        item.cls.settings = _more(item.cls.settings)
    else:
        test = item.obj
        test._hypothesis_internal_use_settings = _more(test._hypothesis_internal_use_settings)


def _more(few: hypothesis.settings) -> hypothesis.settings:
    return hypothesis.settings(few, max_examples=TIMES * few.max_examples)
