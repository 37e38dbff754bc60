"""A response in the background, while the API, the worker and rescue are killed under it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import openai
import psycopg
import pytest

from tests.systems import Up
from tests.waiting import eventually

TEXT = "A mill grinds grain, and it grinds slowly: one word after the other comes out of it."
SLOWLY = """
[models.stub.options]
step_ms = 60
"""


@pytest.fixture
def system(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path, SLOWLY)
    try:
        up.wait_until_ready()
        yield up
    finally:
        up.end()


@pytest.mark.timeout(300)
def test_a_response_that_is_streamed_survives_the_kill_of_all_that_serves_it(system: Up) -> None:
    # given a response in the background, whose first words were heard
    base_url = f"http://127.0.0.1:{system.run_file['api.port']}/v1"
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    stream = client.responses.create(model="stub", input=TEXT, background=True, stream=True)
    heard: list[Any] = [event for event, _ in zip(stream, range(12), strict=False)]
    id = heard[0].response.id

    # when all parts are killed, and the API once more when it is heard again
    for names in (["api", "worker", "rescue"], ["api"], []):
        killed = [part for part in map(system.part, names) if part is not None]
        for part in killed:
            part.send_signal(signal.SIGKILL)
        eventually(partial(_are_others, system, names, killed), 60)
        heard += eventually(partial(_more, client, id, heard[-1].sequence_number, len(names)), 90)
        if heard[-1].type == "response.completed":
            break

    # then nothing is missing and nothing was heard twice, under the same id
    assert [each.sequence_number for each in heard] == list(range(len(heard)))
    assert "".join(each.delta for each in heard if hasattr(each, "delta")) == TEXT
    assert heard[-1].response.id == id and heard[-1].response.output_text == TEXT
    assert client.responses.retrieve(id) == heard[-1].response
    # and there is one result, of more than one attempt
    with psycopg.connect(system.run_file["database.url"]) as connection:
        found = connection.execute("SELECT state, attempt FROM results").fetchall()
    assert [state for state, _ in found] == ["completed"]
    assert found[0][1] > 1


def _are_others(system: Up, names: list[str], killed: list[Any]) -> bool:
    parts = [system.part(name) for name in names]
    return None not in parts and not set(parts) & set(killed)


def _more(client: openai.OpenAI, id: str, after: int, most: int) -> list[Any]:
    """What is heard after an event: to the end, or some of it if more is to be broken."""
    heard: list[Any] = []
    try:
        for event in client.responses.retrieve(id, stream=True, starting_after=after):
            heard.append(event)
            if most and len(heard) >= 8:
                return heard
    except (openai.APIConnectionError, openai.InternalServerError, httpx2.TransportError):
        pass  # it is not there yet, or not any more
    return heard
