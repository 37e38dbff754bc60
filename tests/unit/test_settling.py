"""One message that stands for many jobs, as Celery settles it."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from app.broker.qos import QoS
from app.broker.settling import Bundle, Message, Piece

LOG = logging.getLogger("celery")


class Held(QoS):
    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self._held_for: dict[str, list[Any]] = {}
        self.prefetch_count = 0


class Channel:
    """Notes what becomes of its messages."""

    no_ack_consumers: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.qos = Held()
        self.told: list[str] = []

    def basic_ack(self, tag: str, multiple: bool = False) -> None:
        self.told.append("acknowledged")

    def basic_reject(self, tag: str, requeue: bool = False) -> None:
        self.told.append("given back" if requeue else "rejected")


def bundle(num_jobs: int) -> tuple[Channel, list[Piece]]:
    channel = Channel()
    info = {"exchange": "", "routing_key": "gristmill.stub"}
    payload = {"properties": {"delivery_tag": "tag", "delivery_info": info}}
    message = Message(payload, channel=channel)
    channel.qos.count("tag", "gristmill.stub", num_jobs)
    whole = Bundle(message, num_jobs)
    return channel, [whole.piece() for _ in range(num_jobs)]


def test_a_message_is_acknowledged_once_the_last_of_its_jobs_is() -> None:
    channel, pieces = bundle(3)

    for piece in pieces[:2]:
        piece.ack_log_error(LOG, ())
    assert channel.told == []

    pieces[2].ack_log_error(LOG, ())
    assert channel.told == ["acknowledged"]


def test_a_job_that_is_acknowledged_twice_counts_once() -> None:
    channel, pieces = bundle(2)

    pieces[0].ack_log_error(LOG, ())
    pieces[0].ack_log_error(LOG, ())

    assert channel.told == []


def test_a_message_with_a_job_that_is_to_come_again_comes_again_whole() -> None:
    channel, pieces = bundle(3)

    pieces[0].ack_log_error(LOG, ())
    pieces[1].reject_log_error(LOG, (), requeue=True)
    pieces[2].ack_log_error(LOG, ())

    assert channel.told == ["given back"]


def test_each_job_that_is_done_makes_room_for_another() -> None:
    channel, pieces = bundle(3)
    assert channel.qos.held["gristmill.stub"] == 3

    pieces[1].ack_log_error(LOG, ())

    assert channel.qos.held["gristmill.stub"] == 2
