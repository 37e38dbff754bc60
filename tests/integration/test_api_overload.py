"""Slow clients, storms of polls and too many connections do not keep others out."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from app.api import services
from app.api.metrics import Metrics
from app.api.reader import AT_ONCE
from app.api.services import MAX_BULKS
from app.api.wire import connections, room
from app.config.settings import Settings
from app.intake.submit import Submitter
from app.store import reads
from tests.apis import running_api
from tests.waiting import eventually

JOB = {"body": {"prompt": "A grist mill is"}}
HEAD = (
    b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000000\r\n\r\n"
)


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as api:
        yield api


@contextmanager
def connected(api: httpx.Client, sent: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection((api.base_url.host, api.base_url.port)) as client:
        client.settimeout(30)
        client.sendall(sent)
        yield client


def rest_of(client: socket.socket) -> bytes:
    """What comes until the other side closes."""
    return b"".join(iter(lambda: client.recv(65_536), b""))


def metric(api: httpx.Client, name: str) -> float:
    [line] = [each for each in api.get("/metrics").text.splitlines() if each.startswith(name + " ")]
    return float(line.rpartition(" ")[2])


@pytest.mark.parametrize("sent", [b"", b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_a_request_whose_head_does_not_come_is_given_up(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.2)

    with connected(api, sent) as slow:
        assert rest_of(slow) == b""


def test_a_head_that_drips_on_a_kept_connection_is_given_up(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    with connected(api, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") as slow:
        assert slow.recv(65_536).startswith(b"HTTP/1.1 200")
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.05):
                try:
                    slow.sendall(b"G")
                except OSError:
                    return

        with ThreadPoolExecutor() as pool:
            pool.submit(drip)
            try:
                rest = rest_of(slow)
            except ConnectionResetError:
                rest = b""
            stop.set()
        assert b"200" not in rest


def test_a_request_that_takes_long_is_not_cut_off_by_the_timeout_of_its_head(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.2)
    job_id = api.post("/v1/jobs", json=JOB).json()["id"]

    answer = api.get(f"/v1/jobs/{job_id}", params={"wait": 1})

    assert answer.json()["state"] == "queued"


def test_a_body_that_drips_is_given_up_although_something_always_comes(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PATIENT_S", 0.3)
    with connected(api, HEAD) as slow:
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.05):
                try:
                    slow.sendall(b" ")
                except OSError:
                    return

        with ThreadPoolExecutor() as pool:
            pool.submit(drip)
            answer = slow.recv(65_536)
            stop.set()
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_slow_clients_do_not_keep_others_waiting(api: httpx.Client) -> None:
    with ExitStack() as held:
        for number in range(100):
            held.enter_context(connected(api, HEAD if number % 2 else b"POST /v1/j"))

        assert api.post("/v1/jobs", json=JOB).status_code == 202


def test_beyond_the_most_connections_the_answer_is_busy_and_room_is_used_again(
    settings: Settings,
) -> None:
    few = settings.api.model_copy(update={"max_connections": 5})
    with running_api(settings.model_copy(update={"api": few})) as api:
        with ExitStack() as held:
            for _ in range(5):
                held.enter_context(connected(api))
            with connected(api) as one_more:
                head, _, body = rest_of(one_more).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"Retry-After: 1" in head
            assert json.loads(body)["code"] == "too_many_connections"

        def there_is_room() -> bool:
            with connected(
                api, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            ) as c:
                return rest_of(c).startswith(b"HTTP/1.1 200")

        eventually(there_is_room)


def test_connections_that_are_kept_for_later_do_not_keep_others_out(settings: Settings) -> None:
    few = settings.api.model_copy(update={"max_connections": 5})
    with (
        running_api(settings.model_copy(update={"api": few})) as api,
        ExitStack() as held,
    ):
        for _ in range(12):
            kept = held.enter_context(
                connected(api, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            )
            assert kept.recv(12) == b"HTTP/1.1 200"

        assert api.post("/v1/jobs", json=JOB).status_code == 202


def test_the_connection_that_was_idle_for_the_longest_gives_way(settings: Settings) -> None:
    few = settings.api.model_copy(update={"max_connections": 2})
    asked = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with (
        running_api(settings.model_copy(update={"api": few})) as api,
        connected(api, asked) as old,
    ):
        assert old.recv(12) == b"HTTP/1.1 200"
        with connected(api, asked) as young, connected(api, asked) as third:
            for each in (young, third):
                assert each.recv(12) == b"HTTP/1.1 200"

            assert b"HTTP/1.1" not in rest_of(old)  # the rest of its one answer, and the end
            young.sendall(asked)
            eventually(lambda: b"HTTP/1.1 200" in young.recv(4_096))


def test_a_long_poll_beyond_the_most_is_answered_at_once(settings: Settings) -> None:
    few = settings.api.model_copy(update={"max_long_polls": 2})
    with (
        running_api(settings.model_copy(update={"api": few})) as api,
        ThreadPoolExecutor() as pool,
    ):
        job_id = api.post("/v1/jobs", json=JOB).json()["id"]
        held = [pool.submit(api.get, f"/v1/jobs/{job_id}", params={"wait": 50}) for _ in range(2)]
        eventually(lambda: metric(api, "gristmill_long_polls") == 2)

        answer = api.get(f"/v1/jobs/{job_id}", params={"wait": 50})

        assert answer.json()["state"] == "queued"
        assert answer.headers["retry-after"] == "1"
        assert not any(each.done() for each in held)
        api.post(f"/v1/jobs/{job_id}/cancel")
        assert {each.result(timeout=30).json()["state"] for each in held} == {"cancelled"}


def test_a_storm_of_polls_that_stand_still_leaves_threads_for_submissions(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    begun = threading.Semaphore(0)
    find = reads.find

    def find_when_let(*args: Any, **given: Any) -> Any:
        begun.release()
        assert go_on.wait(60)
        return find(*args, **given)

    with running_api(settings) as api, ThreadPoolExecutor(40) as pool:
        ids = [api.post("/v1/jobs", json=JOB).json()["id"] for _ in range(30)]
        monkeypatch.setattr(reads, "find", find_when_let)
        try:
            polls = [pool.submit(api.get, f"/v1/jobs/{job_id}") for job_id in ids]
            for _ in range(AT_ONCE):
                assert begun.acquire(timeout=30)

            # A bulk submission reads no job back, so what keeps the polls does not keep it.
            bulk = api.post("/v1/jobs/bulk", json={"jobs": [JOB]})

            assert bulk.status_code == 202
            assert not begun.acquire(timeout=0.1)  # the other polls wait for the next look
        finally:
            go_on.set()
        assert {each.result(timeout=60).status_code for each in polls} == {200}


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────


PADDED = json.dumps(JOB).encode() + b" " * 150_000
UNFINISHED = HEAD.replace(b"1000000", b"199000") + b" " * 150_000


@pytest.fixture
def narrow(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """An API with room for three bodies, which gives those who stand still no time once it is short
    of room, and all the time until then."""
    monkeypatch.setattr(room, "HURRIED_S", 0.2)
    monkeypatch.setattr(room, "PATIENT_S", 1_000.0)
    few = {"max_body_bytes": 200_000, "max_bulk_bytes": 200_000, "max_held_bytes": 460_000}
    return settings.model_copy(update={"api": settings.api.model_copy(update=few)})


def submit_bytes(api: httpx.Client, body: bytes) -> int:
    headers = {"Content-Type": "application/json"}
    return api.post("/v1/jobs", content=body, headers=headers).status_code


def test_unfinished_bodies_give_way_to_those_that_come(narrow: Settings) -> None:
    with running_api(narrow) as api, ExitStack() as held:
        silent = [held.enter_context(connected(api, UNFINISHED)) for _ in range(2)]

        assert submit_bytes(api, PADDED[:1_000]) == 202  # small ones wait for nothing
        assert select.select(silent, [], [], 0)[0] == []
        for _ in range(2):
            held.enter_context(connected(api, UNFINISHED))
        assert submit_bytes(api, PADDED) == 202

        answers = [rest_of(each) for each in silent]
        assert {each[:12] for each in answers} == {b"HTTP/1.1 503"}
        assert all(b"\r\nRetry-After: 2\r\n" in each for each in map(bytes.title, answers))


def test_the_rest_of_a_body_that_is_answered_is_not_waited_for(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.2)

    with connected(api, HEAD.replace(b"/v1/jobs", b"/nowhere") + b" ") as slow:
        assert rest_of(slow).startswith(b"HTTP/1.1 404")


ASKING = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500


@contextmanager
def not_reading(api: httpx.Client) -> Iterator[socket.socket]:
    """A client that asks for more than the system holds for it, and reads nothing."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.connect((api.base_url.host, api.base_url.port))
        client.sendall(ASKING)
        yield client


def is_cut_off(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, select.POLLIN)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def test_a_client_that_does_not_read_its_answer_is_cut_off(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "WRITE_TIMEOUT_S", 0.2)

    with not_reading(api) as client:
        eventually(lambda: is_cut_off(client), timeout_s=30)


def test_beyond_the_most_bytes_who_has_not_read_for_the_longest_is_cut_off(
    settings: Settings,
) -> None:
    few = settings.api.model_copy(update={"max_unread_bytes": 10_000})
    with (
        running_api(settings.model_copy(update={"api": few})) as api,
        not_reading(api) as first,
    ):
        assert not is_cut_off(first)
        with not_reading(api) as second:
            eventually(lambda: is_cut_off(first), timeout_s=30)

            assert not is_cut_off(second)
        assert api.get("/healthz").status_code == 200


def test_a_client_that_reads_late_gets_all_its_answers(api: httpx.Client) -> None:
    one = api.get("/openapi.json").content
    with not_reading(api) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        client.settimeout(60)

        assert rest_of(client).count(one) == 500


# ── bulks ───────────────────────────────────────────────────────────────────────────────────────


BULK_HEAD = HEAD.replace(b"/v1/jobs", b"/v1/jobs/bulk")


def test_silent_bulk_connections_keep_nobodys_bulk_waiting(api: httpx.Client) -> None:
    with ExitStack() as held:
        silent = [held.enter_context(connected(api, BULK_HEAD)) for _ in range(2 * MAX_BULKS)]

        assert api.post("/v1/jobs/bulk", json={"jobs": [JOB]}).status_code == 202

        answered, _, _ = select.select(silent, [], [], 0)
        assert answered == []  # all of them were still being waited for


def test_a_bulk_whose_turn_does_not_come_is_told_so_and_not_stored(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "BULK_WAIT_S", 0.2)
    go_on, begun = threading.Event(), threading.Semaphore(0)
    store = Submitter.store

    def store_when_let(*args: Any) -> Any:
        begun.release()
        assert go_on.wait(60)
        return store(*args)

    monkeypatch.setattr(Submitter, "store", store_when_let)
    with ThreadPoolExecutor() as pool:
        try:
            bulk = {"jobs": [JOB]}
            first = [pool.submit(api.post, "/v1/jobs/bulk", json=bulk) for _ in range(MAX_BULKS)]
            for _ in first:
                assert begun.acquire(timeout=30)

            refused = api.post("/v1/jobs/bulk", json=bulk)
        finally:
            go_on.set()
        assert {each.result(timeout=60).status_code for each in first} == {202}

    assert (refused.status_code, refused.json()["code"]) == (503, "busy")
    assert int(refused.headers["retry-after"]) > 0
    assert len(api.get("/v1/jobs").json()["data"]) == MAX_BULKS


# ── probes ──────────────────────────────────────────────────────────────────────────────────────


def test_a_storm_of_scrapes_takes_one_look_and_no_thread_of_submissions(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, looks = threading.Event(), threading.Semaphore(0)
    text = Metrics.text

    def text_when_let(metrics: Metrics) -> bytes:
        looks.release()
        assert go_on.wait(60)
        return text(metrics)

    monkeypatch.setattr(Metrics, "text", text_when_let)
    number = 2 * settings.database.pool_size
    with running_api(settings) as api, ThreadPoolExecutor(number) as pool:
        try:
            scrapes = [pool.submit(api.get, "/metrics") for _ in range(number)]
            assert looks.acquire(timeout=30)

            assert api.post("/v1/jobs", json=JOB).status_code == 202
            assert not looks.acquire(timeout=0.1)
        finally:
            go_on.set()
        answers = [each.result(timeout=60) for each in scrapes]
    assert {each.status_code for each in answers} == {200}
    assert len({each.content for each in answers}) == 1
