"""Kombu's Redis transport, made to outlive its connection and a server that refuses or is full.

Kombu knows a lost connection and takes an error reply for a fault of the program, which ends the
worker. But a server that was demoted, or may not save, or has changed a user's rights, heals as one
that was away does. So every error reply counts as a lost connection here: Celery closes its own,
connects anew and goes on from there.

When Redis goes away kombu closes the connection's channels one by one and stops at the first that
fails. The consumer's own channel may be left open, on a transport that has forgotten where its
server is: giving back the unacknowledged messages, or acknowledging one later, is then an
AttributeError, which Celery takes for the end of the worker.

Messages are waited for by kombu's BRPOP. Once one has come, those behind it are fetched together,
and so are those that follow as work gets done: one round trip takes off what is done and brings as
many again. Those of tenants are in lists of their own (`lanes`), and a bell is waited for.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from queue import Empty
from types import MappingProxyType
from typing import Any, Final
from uuid import uuid4

from kombu.transport import redis
from kombu.utils.json import dumps, loads
from kombu.utils.scheduling import round_robin_cycle
from redis import Redis
from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import NoScriptError, RedisError, ResponseError

from app import telemetry
from app.broker import lanes
from app.broker.fetching import MAX_BYTES, Fetcher, Taken
from app.broker.message import TENANT_HEADER, num_jobs
from app.broker.qos import QoS, UnlessFull, UnlessLost
from app.broker.queues import LIVE, Layout
from app.broker.refusal import said
from app.broker.settling import Message
from app.broker.tally import Tally
from app.jobs import LIVE_PRIORITY

log = logging.getLogger(__name__)
telemetry.say_once(log)


class Turns(round_robin_cycle):
    """The order in which queues are asked: who was served last is asked last.

    Redis looks at every queue for urgent messages before it looks at any for patient ones, so this
    is the order within each step of priority. A queue that has its budget of held messages is left
    out until some are acknowledged, so that a long queue does not take the room of an idle one.
    """

    def __init__(self, channel: Any) -> None:
        super().__init__([])  # type: ignore[no-untyped-call]
        self._channel = channel

    def consume(self, n: int) -> list[str]:
        return [queue for queue in super().consume(n) if not self._channel._is_sated(queue)]  # type: ignore[no-untyped-call]


SHARED: Final = "shared "
"""Before a queue's name in the count of its messages that came by others; no name has a space."""

MOST_AT_ONCE: Final = 256
"""Jobs that are taken in one round trip, as far as the last message of them goes beyond it."""

LOOK_AGAIN_S: Final = 0.05
"""Longest wait for a queue that has room again, and that BRPOP does not wait for."""

ASK_S: Final = 5.0
"""Longest wait of a BRPOP for all queues of a worker. One that leaves out a queue without room is
asked anew every second, and where no hub turns, for the next may be for other queues."""

BINDINGS_S: Final = 30.0
"""Between two looks whether a binding is soon over; kombu has them last for an hour, and would look
every second."""


def _read(queue: str, item: bytes) -> dict[str, Any] | None:
    payload: dict[str, Any] = loads(item.decode())  # type: ignore[no-untyped-call]
    return payload


class _Outliving:
    """What a channel does after its connection is gone works, or is a connection error: Celery logs
    that, and rescue sends again what could not be given back."""

    Message = Message
    QoS = QoS
    queue_budgets: Mapping[str, int] = MappingProxyType({})  #: most jobs held, by queue
    shared_budgets: Mapping[str, int] = MappingProxyType({})  #: and of those that came by others
    tally = Tally(Layout())  #: of who has one; nothing is noted in this
    read = staticmethod(_read)
    """Makes the payload of an item of this queue, or says None: it is nothing for us."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._known: dict[bool, dict[str, Any]] = {}  #: how to reach Redis
        self._long: set[str] = set()  #: queues in which more waits, as far as is known
        self._unnoted: set[str] = set()  #: queues whose messages nobody acknowledges
        self._asked: set[str] = set()  #: the queues that BRPOP waits for, or did last
        self._passing: dict[str, tuple[Any, str]] = {}  #: messages for other lists, by tag
        self._keeps_all = False  #: for nothing can be passed on
        self._plain: Redis | None = None
        self.num_heard = 1  #: who got the last message that is for all who listen
        super().__init__(*args, **options)
        self._queue_cycle = Turns(self)
        self._connparams(asynchronous=False)  # while the transport knows
        self._fetcher = Fetcher(self.qos.prefix)  # type: ignore[attr-defined]

    @property
    def plain(self) -> Redis:
        """A client whose keys are whole. To make one takes longer than most of what it is for."""
        pool = self.pool  # type: ignore[attr-defined]
        if self._plain is None or self._plain.connection_pool is not pool:
            self._plain = Redis(connection_pool=pool)
        return self._plain

    # ── which messages stay ──────────────────────────────────────────────────────────────────

    def keeps(self, message: Any, queue: str) -> bool:
        """Whether a message that belongs to this queue stays, whichever list it was taken from.

        In a list that several models share, those of one model would hold up all behind them. So
        some stay beside what the model's own queue gives, and the others go on to that queue.
        """
        if queue not in self.queue_budgets:
            return True
        if message.delivery_info.get("routing_key") in self.queue_budgets:
            return True
        held: Counter[str] = self.qos.held  # type: ignore[attr-defined]
        shared = f"{SHARED}{queue}"
        if held[shared] < self.shared_budgets.get(queue, 0):
            self.qos.count_as(message.delivery_tag, shared)  # type: ignore[attr-defined]
            return True
        is_read = queue in self.active_queues  # type: ignore[attr-defined]
        if is_read and self._is_sated(queue) and not self._keeps_all:
            self._passing[message.delivery_tag] = message, queue
            return False
        self.qos.count_as(message.delivery_tag, queue)  # type: ignore[attr-defined]
        return True

    def _is_sated(self, queue: str) -> bool:
        budget = self.queue_budgets.get(queue)
        return budget is not None and self.qos.held[queue] >= budget  # type: ignore[attr-defined]

    def _pass_on(self) -> None:
        """Move what was taken and does not stay to the new end of its queue; or keep it after all,
        if the server is full, or refuses that."""
        passing, self._passing = self._passing, {}
        if not passing:
            return
        try:
            self.qos.move({tag: self._moved(*each) for tag, each in passing.items()})  # type: ignore[attr-defined]
        except ResponseError as error:
            log.warning("%s Messages are held here beyond their model's share.", said(error))
            self._keeps_all = True
            try:
                for message, queue in passing.values():
                    self.connection._deliver(message._raw, queue)  # type: ignore[attr-defined]
            finally:
                self._keeps_all = False

    def _moved(self, message: Any, queue: str) -> tuple[str, str]:
        """The key and the item of a message in its own queue."""
        properties = message.properties | {
            "delivery_tag": str(uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
        }
        item = message.serializable() | {"properties": properties}
        key = self._q_for_pri(queue, self._get_message_priority(item, reverse=False))  # type: ignore[attr-defined]
        return key, dumps(item)  # type: ignore[no-untyped-call]

    # ── taking and taking off ────────────────────────────────────────────────────────────────

    def settle_soon(self) -> None:
        """When the hub has done what it does now; at once where none turns."""
        if getattr(self.connection, "loop", None) is None:  # type: ignore[attr-defined]
            self.settle()

    def settle(self, first: Taken | None = None, new_in: str | None = None) -> None:
        """Take off what is done, tell what it used, and take more where more waits: one round trip.

        `first` was taken before and is to be noted. From the queue `new_in` only newcomers' are
        taken, and nothing of others.
        """
        most, rooms = self._rooms(first) if new_in is None else self._rooms_for_new(new_in)
        done = self.qos.take_done()  # type: ignore[attr-defined]
        if not (done or rooms or first or self.tally.is_due):
            return
        prefix = getattr(self, "global_keyprefix", "")
        notes = prefix + self.unacked_key, prefix + self.unacked_index_key  # type: ignore[attr-defined]
        weights = prefix + lanes.WEIGHTS
        pipe = self.plain.pipeline(transaction=False)
        used = self.tally.tell(pipe)
        if done:
            pipe.zrem(notes[1], *done)
            pipe.hdel(notes[0], *done)
        if takes := bool(rooms or first):
            lists = [
                [f"{prefix}{queue}{self.sep}{LIVE}" for queue in rooms],  # type: ignore[attr-defined]
                *(
                    [prefix + self._q_for_pri(queue, step) for queue in rooms]  # type: ignore[attr-defined]
                    for step in self.priority_steps  # type: ignore[attr-defined]
                ),
            ]
            self._fetcher.call(
                *(pipe, (*notes, weights), lists, rooms, most, first),
                prefix=prefix,
                sep=self.sep,  # type: ignore[attr-defined]
                only_new=new_in is not None,
            )
        try:
            replies = pipe.execute(raise_on_error=False)
            if used and not isinstance(replies.pop(0), ResponseError):
                used = {}  # that was heard, whatever becomes of the rest
            if takes and isinstance(replies[-1], NoScriptError):
                replies[-1] = self._fetcher.load_and_repeat(self.plain)
        except (RedisError, OSError):
            if takes:
                self.qos.expect(self._fetcher.tags(most))  # type: ignore[attr-defined]
            raise
        finally:
            self.tally.keep(used)
        for refused in replies[: 2 if done else 0]:
            if isinstance(refused, ResponseError):
                log.warning("%s Messages are done and not taken off.", said(refused))
        if takes:
            self._take(replies[-1], most, rooms, is_all=new_in is None)

    def _rooms_for_new(self, queue: str) -> tuple[int, dict[str, int]]:
        """The same beyond what a queue is given: its bell was heard here, and may have to be rung
        again for others, so that it is asked for even if there is no room by now."""
        most = self.qos.can_consume_max_estimate()  # type: ignore[attr-defined]
        held = self.qos.held[queue]  # type: ignore[attr-defined]
        room = max(
            0, min(MOST_AT_ONCE if most is None else most, self._most_with_new(queue) - held)
        )
        return room, {queue: room}

    def _most_with_new(self, queue: str) -> int:
        """Jobs of a queue that are held at most, newcomers' included."""
        return self.queue_budgets.get(queue, 0) * 3 // 2

    def _rooms(self, first: Taken | None) -> tuple[int, dict[str, int]]:
        """Jobs to take now, and of each queue at most; none if none waits, as far as is known. The
        last message may go beyond it. `first` is held and not counted yet; and of the queues that
        were asked for a message may be on its way."""
        coming = dict.fromkeys(self._asked, 1) if self._in_poll else {}
        self._long |= self.missed
        if first:
            coming = {first.queue: first.num_jobs}
        most = self.qos.can_consume_max_estimate()  # type: ignore[attr-defined]
        most = MOST_AT_ONCE if most is None else most - max(coming.values(), default=0)
        most = min(most, MOST_AT_ONCE)
        if self._closing or most <= 0:
            return 0, {}
        rooms = {}
        for queue in self._queue_cycle.consume(len(self.active_queues)):  # type: ignore[attr-defined]
            if queue in self._unnoted:
                continue
            held = self.qos.held[queue] + coming.get(queue, 0)  # type: ignore[attr-defined]
            if (room := min(most, self.queue_budgets.get(queue, most + held) - held)) > 0:
                rooms[queue] = room
        if self._long.isdisjoint(rooms):
            return 0, {}
        return most, rooms

    def _take(self, reply: Any, most: int, rooms: Mapping[str, int], *, is_all: bool) -> None:
        """Deliver what was fetched; `is_all` tells whether all that waits was asked for."""
        taken = self._fetcher.first
        if isinstance(reply, ResponseError):
            self._long.clear()
            log.warning("%s Messages are taken one by one.", said(reply))
            for each in taken:  # kombu may have more luck with its note
                self._deliver(replace(each, tag=str(uuid4())))
            return
        refused, more = self._fetcher.read(reply, list(rooms))
        if refused:
            sentence = "%s Messages are taken one by one, or are held here alone."
            log.warning(sentence, said(ResponseError(refused)))
        by_queue: Counter[str] = Counter()
        for each in more:
            by_queue[each.queue] += each.num_jobs
        is_cut = by_queue.total() >= most or sum(len(each.item) for each in more) >= MAX_BYTES
        for queue, room in rooms.items() if is_all else ():
            (self._long.add if is_cut or by_queue[queue] >= room else self._long.discard)(queue)
        for queue in by_queue:
            self._queue_cycle.rotate(queue)  # type: ignore[no-untyped-call]
        left = iter([*taken, *more])
        try:
            for each in left:
                self._deliver(each)
            self._pass_on()
        finally:
            self.qos.expect(each.tag for each in left)  # type: ignore[attr-defined]

    def _deliver(self, taken: Taken) -> None:
        payload = taken.payload or self.read(taken.queue, taken.item)
        if payload is None:
            self.qos.drop(taken.tag)  # type: ignore[attr-defined]
            return
        payload["properties"]["delivery_tag"] = taken.tag
        self.connection._deliver(payload, taken.queue)  # type: ignore[attr-defined]

    @property
    def missed(self) -> set[str]:
        """Queues that have room by now, and that the BRPOP under way does not wait for."""
        if not self._in_poll:
            return set()
        active: set[str] = set(self.active_queues)  # type: ignore[attr-defined]
        return {queue for queue in active - self._asked if not self._is_sated(queue)}

    def _brpop_start(self, timeout: float | None = None) -> None:
        queues = self._queue_cycle.consume(len(self.active_queues))  # type: ignore[attr-defined]
        self._asked = set(queues)
        new = self._open_to_new(queues)
        bells = [self._bell(queue, lanes.BELL) for queue in queues if queue in self.queue_budgets]
        bells += [self._bell(queue, lanes.NEW) for queue in new]
        if len(queues) + len(new) < len(self.active_queues):  # type: ignore[attr-defined]
            timeout = LOOK_AGAIN_S  # for newcomers of a queue that is not asked for at all
        elif not new and getattr(self.connection, "loop", None) is not None:  # type: ignore[attr-defined]
            timeout = ASK_S
        lists = [
            self._q_for_pri(queue, step)  # type: ignore[attr-defined]
            for step in self.priority_steps  # type: ignore[attr-defined]
            for queue in queues
        ]
        if not (bells or lists):
            return
        client: Any = self.client  # type: ignore[attr-defined]
        self._in_poll: Any = client.connection
        self._brpop_sent_at: Any = time.monotonic()
        words = ["BRPOP", *bells, *lists, timeout or self.brpop_timeout]  # type: ignore[attr-defined]
        if getattr(self, "global_keyprefix", ""):
            words = client._prefix_args(words)
        client.connection.send_command(*words)

    def _bell(self, queue: str, name: str) -> str:
        return f"{queue}{self.sep}{name}"  # type: ignore[attr-defined]

    def _open_to_new(self, asked: Sequence[str]) -> list[str]:
        """Queues that are not asked for all they have, and of which newcomers would be taken."""
        held: Counter[str] = self.qos.held  # type: ignore[attr-defined]
        return [
            queue
            for queue in self.active_queues  # type: ignore[attr-defined]
            if queue not in asked and held[queue] < self._most_with_new(queue)
        ]

    def _brpop_read(self, **options: Any) -> bool:
        """One message, and those behind it."""
        client: Any = self.client  # type: ignore[attr-defined]
        try:
            found = client.parse_response(client.connection, "BRPOP", **options)
        except self.connection_errors:  # type: ignore[attr-defined]
            client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()  # type: ignore[attr-defined]
        if not found:
            raise Empty
        key, item = found
        queue, _, bell = key.decode().rpartition(self.sep)  # type: ignore[attr-defined]
        if bell == lanes.NEW and queue in self.queue_budgets:
            self.settle(new_in=queue)
            return True
        queue = key.decode().rsplit(self.sep, 1)[0]  # type: ignore[attr-defined]
        self._queue_cycle.rotate(queue)  # type: ignore[no-untyped-call]
        if bell == lanes.BELL and queue in self.queue_budgets:
            self._long.add(queue)
            self.settle()
            return True
        payload = self.read(queue, item)
        if queue in self._unnoted:
            if payload:
                self.connection._deliver(payload, queue)  # type: ignore[attr-defined]
            return True
        self._long.add(queue)
        if payload:
            self.settle(Taken("", queue, item, num_jobs(payload.get("headers") or {}), payload))
        else:
            self.settle()
        return True

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        """A tenant's message goes into a list of its own, and what is waited for into a lane."""
        is_live = message["properties"].get("priority") == LIVE_PRIORITY
        tenant = (message.get("headers") or {}).get(TENANT_HEADER)
        if not tenant:
            return super()._put(queue, message, **options)  # type: ignore[misc,no-any-return]
        step = self._q_for_pri(queue, self._get_message_priority(message, reverse=False))  # type: ignore[attr-defined]
        if is_live:
            step = f"{queue}{self.sep}{LIVE}"  # type: ignore[attr-defined]
        key = getattr(self, "global_keyprefix", "") + queue
        text = dumps(message)  # type: ignore[no-untyped-call]
        words = (lanes.PUSH, 1, key, step.removeprefix(queue), self.sep, tenant, text)  # type: ignore[attr-defined]
        if (batch := options.get("_publish_batch")) is not None:
            batch.add("eval", *words)
            return None
        with self.conn_or_acquire() as client:  # type: ignore[attr-defined]
            client.eval(*words)
        return None

    def basic_consume(self, queue: str, no_ack: bool = False, *args: Any, **options: Any) -> Any:
        if no_ack:
            self._unnoted.add(queue)
        return super().basic_consume(queue, no_ack, *args, **options)  # type: ignore[misc]

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **_: Any) -> None:
        payload = dumps(message)  # type: ignore[no-untyped-call]
        topics = self._get_publish_topics(exchange, routing_key)  # type: ignore[attr-defined]
        with self.conn_or_acquire() as client:  # type: ignore[attr-defined]
            self.num_heard = sum(client.publish(topic, payload) for topic in topics)

    # ── outliving ────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """What is done by now is taken off while the connection lasts."""
        self._closing = True
        with UnlessLost():
            self.settle()
        super().close()  # type: ignore[misc]

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if asynchronous not in self._known:
            self._known[asynchronous] = super()._connparams(asynchronous)  # type: ignore[misc]
        return dict(self._known[asynchronous])

    def _size(self, queue: str) -> int:
        """Counted without a transaction: a full server refuses one that only reads, too."""
        with self.conn_or_acquire() as client:  # type: ignore[attr-defined]
            lists = (self._q_for_pri(queue, step) for step in self.priority_steps)  # type: ignore[attr-defined]
            return sum(client.llen(each) for each in lists)

    def _queue_bind(self, *args: Any) -> None:
        """A consumer takes from its list with or without this note; the next connection makes it.

        Workers that ran before have left it, too.
        """
        with UnlessFull("a queue is not noted"):
            super()._queue_bind(*args)  # type: ignore[misc]


class Channel(_Outliving, redis.Channel):
    from_transport_options: Any = (
        *redis.Channel.from_transport_options,
        "queue_budgets",
        "shared_budgets",
    )


class SentinelChannel(_Outliving, redis.SentinelChannel):
    from_transport_options: Any = (
        *redis.SentinelChannel.from_transport_options,
        "queue_budgets",
        "shared_budgets",
    )

    def _get_pool(self, asynchronous: bool = False) -> Any:
        if self.connection.client is None:
            raise NotConnected("The transport is closed, and knows its Sentinels no more.")
        return super()._get_pool(asynchronous)  # type: ignore[no-untyped-call]


class _Turning:
    """Knows the hub that turns it, so that what is done in one turn is taken off together."""

    loop: Any = None
    after_turn: Callable[[], object] = staticmethod(lambda: None)
    """Called once all messages of a turn have been delivered."""
    end_wait: Callable[[], object] = staticmethod(lambda: None)
    """Ends the hub's wait, whichever comes next."""
    _looks = False  #: the hub turns again soon, for what BRPOP misses

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self.loop = loop
        super().register_with_event_loop(connection, loop)  # type: ignore[misc]
        loop.on_tick.add(self._settle)
        cycle: Any = self.cycle  # type: ignore[attr-defined]
        cycle._binding_expiry_tref.cancel()
        cycle._binding_expiry_tref = loop.call_repeatedly(
            BINDINGS_S, cycle.maybe_refresh_binding_expiry
        )

    def _settle(self) -> None:
        """Between what the hub does in a turn and its wait for the next."""
        for channel in self.channels:  # type: ignore[attr-defined]
            channel.settle()
        self.after_turn()
        if not self._looks and self._look_again():
            self.end_wait()  # that was settled before this timer was set, and may be a second

    def _look_again(self) -> bool:
        """Have the hub turn again soon while something is missed; each turn looks for messages."""
        self._looks = any(channel.missed for channel in self.channels)  # type: ignore[attr-defined]
        if self._looks:
            self.loop.call_later(LOOK_AGAIN_S, self._look_again)
        return self._looks


class Transport(_Turning, redis.Transport):
    Channel = Channel
    connection_errors = (*redis.Transport.connection_errors, RedisError)


class SentinelTransport(_Turning, redis.SentinelTransport):
    Channel = SentinelChannel
    connection_errors = (*redis.SentinelTransport.connection_errors, RedisError)
