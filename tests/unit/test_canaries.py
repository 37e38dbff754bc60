"""Whoever looks for canaries finds them, however they are written."""

from __future__ import annotations

import base64
import json

import pytest

from tests.canaries import Cage, canary


@pytest.mark.parametrize("before", range(4))
def test_a_canary_is_found_as_it_is_and_in_base64_and_in_hexadecimal(before: int) -> None:
    word = "x" * before + canary("mill", "prompt") + " and more"
    data = word.encode()
    written = {
        "text": word,
        "bytes": data,
        "JSON": json.dumps({"a": [word]}),
        "base64": f'{{"body": "{base64.b64encode(data).decode()}"}}',
        "in a URL": base64.urlsafe_b64encode(data).decode().rstrip("="),
        "bytea": rf"\x{data.hex()}",
    }
    cage = Cage()

    for place, text in written.items():
        cage.look(place, text)
    cage.look("elsewhere", "a canary in a mine")

    assert cage.places("prompt", "mill") == set(written)
