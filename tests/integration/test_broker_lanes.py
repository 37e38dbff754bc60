"""Tenants that share a queue take turns by what they use of the device: on a real Redis."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing
from uuid import UUID, uuid4

import pytest
import redis
from hypothesis import settings as limits
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from app.broker import lanes
from app.broker.fetching import Fetcher
from app.broker.lanes import BELL, Used
from app.broker.message import Message
from app.broker.publisher import Publisher
from app.broker.queues import PATIENT_SHARE, queue_name
from app.config.settings import ModelSettings, Settings
from app.jobs import DEFAULT_TENANT, LIVE_PRIORITY, Kind
from tests.integration.test_broker_fetching import taking
from tests.own_redis import OwnRedis, running_redis
from tests.pushed import push

STUB = {"source": "stub", "kind": "generate", "engine": "stub", "max_batch_size": 8}
QUEUE = queue_name("stub")
ONES: dict[str, float] = {}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def client(server: OwnRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        client.flushdb()
        yield client


@pytest.fixture
def settings(
    make_settings: Callable[..., Settings], server: OwnRedis, client: redis.Redis
) -> Settings:
    models = {"stub": ModelSettings.model_validate(STUB)}
    return make_settings(broker={"url": server.url, "key_prefix": "mill:"}, models=models)


@pytest.fixture
def publisher(settings: Settings) -> Iterator[Publisher]:
    with closing(Publisher(settings)) as publisher:
        yield publisher


def messages(tenant: str, number: int, priority: int = 0) -> list[Message]:
    return [
        Message(uuid4(), Kind.GENERATE, "stub", priority=priority, tenant=tenant)
        for _ in range(number)
    ]


class Mill:
    """A queue and one who takes from it and tells what was used, without a worker around it."""

    def __init__(self, publisher: Publisher, client: redis.Redis) -> None:
        self.publisher = publisher
        self._client = client
        self._layout = publisher.layout
        self._fetcher = Fetcher("mill:")
        self.tenants: dict[str, str] = {}  #: by job id
        self._sizes: dict[str, int] = {}

    def push(self, tenant: str, number: int, together: int = 1, priority: int = 0) -> list[str]:
        ids: list[str] = []
        for _ in range(number):
            some = messages(tenant, together, priority)
            self.publisher.send_many(some)
            for each in some:
                self.tenants[str(each.job_id)] = tenant
            self._sizes[str(some[0].job_id)] = together
            ids.append(str(some[0].job_id))
        return ids

    def take(self, jobs: int = 1, only_new: bool = False) -> list[str]:
        """The messages of so many jobs, or of one more, by the id of each one's first job."""
        lists = [[f"mill:{QUEUE}{end}"] for end in self._layout.ends]
        own = ("mill:notes", "mill:index", "mill:gristmill.weights")
        pipe = self._client.pipeline(transaction=False)
        given = (pipe, own, lists, {QUEUE: jobs}, jobs, None)
        self._fetcher.call(*given, prefix="mill:", sep=self._layout.sep, only_new=only_new)
        [reply] = pipe.execute(raise_on_error=False)
        if isinstance(reply, redis.exceptions.NoScriptError):
            reply = self._fetcher.load_and_repeat(self._client)
        assert not isinstance(reply, Exception), reply
        refused, taken = self._fetcher.read(reply, [QUEUE])
        assert not refused
        return [_id_in(each.item) for each in taken]

    def used(self, ids: list[str], ns: int) -> None:
        """Their jobs have ended, and took so long each."""
        for each in ids:
            size = self._sizes[each]
            self.note_used(self.tenants[each], Used(size, size, ns * size))

    def note_used(self, tenant: str, used: Used) -> None:
        lanes.note_used(self._client, {("stub", 0, tenant): used}, self._layout)

    def run(self, jobs: int, ns: Callable[[str], int]) -> Counter[str]:
        """Serve so many jobs one after the other; how often each tenant was served."""
        served: Counter[str] = Counter()
        for _ in range(jobs):
            [taken] = self.take()
            tenant = self.tenants[taken]
            served[tenant] += 1
            self.used([taken], ns(tenant))
        return served


def _id_in(item: bytes) -> str:
    at = item.index(b'"id": "') + 7
    return item[at : at + 36].decode()


@pytest.fixture
def mill(publisher: Publisher, client: redis.Redis) -> Mill:
    return Mill(publisher, client)


def test_a_lone_job_comes_next_however_many_of_another_tenant_wait(mill: Mill) -> None:
    noisy = mill.push("noisy", 200)
    assert mill.take(20) == noisy[:20]

    [lone] = mill.push("lone", 1)

    assert lone in mill.take(2)


def test_a_lone_job_comes_before_the_second_of_each_of_a_hundred_tenants(mill: Mill) -> None:
    for number in range(100):
        mill.push(f"noisy {number}", 4)
    mill.take(50)

    [lone] = mill.push("lone", 1)

    assert lone in mill.take(101)


def test_tenants_are_served_by_their_weights(mill: Mill) -> None:
    weights = {"one": 1.0, "two": 2.0, "five": 5.0}
    mill.publisher.set_weights(weights)
    for tenant in weights:
        mill.push(tenant, 60)

    served = mill.run(80, lambda _: 1_000_000)

    for tenant, weight in weights.items():
        assert served[tenant] == pytest.approx(80 * weight / 8, abs=3)


def test_tenants_are_served_by_device_time_and_not_by_jobs(mill: Mill) -> None:
    took = {"short": 1_000_000, "long": 4_000_000}
    for tenant in took:
        mill.push(tenant, 90)

    served = mill.run(100, took.__getitem__)

    assert served["short"] == pytest.approx(80, abs=5)


def test_who_has_next_to_no_weight_is_served_now_and_then_all_the_same(mill: Mill) -> None:
    mill.publisher.set_weights({"least": 1e-6})
    for tenant in ("least", "one", "two"):
        mill.push(tenant, 70)

    served = mill.run(100, lambda _: 1_000_000)

    assert served["least"] >= 100 // (PATIENT_SHARE * 3)


def test_having_waited_for_nothing_saves_up_no_turns(mill: Mill) -> None:
    mill.push("busy", 100)
    mill.push("idle", 1)
    mill.run(40, lambda _: 1_000_000)
    mill.push("idle", 40)

    served = mill.run(40, lambda _: 1_000_000)

    assert abs(served["idle"] - served["busy"]) <= 3


def test_messages_of_no_tenant_take_turns_with_those_of_tenants(
    mill: Mill, client: redis.Redis
) -> None:
    mine = push(client, f"mill:{QUEUE}", "stub", 100)
    theirs = mill.push("a tenant", 100)

    taken = mill.take(50)

    assert len(set(taken) & set(mine)) == pytest.approx(25, abs=4)
    assert len(set(taken) & set(theirs)) == pytest.approx(25, abs=4)


def test_what_jobs_did_not_use_is_given_back(mill: Mill) -> None:
    mill.push("one", 20)
    mill.push("other", 20)
    served: Counter[str] = Counter()
    for _ in range(20):
        [taken] = mill.take()
        served[mill.tenants[taken]] += 1
        used = Used(1, 1, 1_000_000) if mill.tenants[taken] == "one" else Used(ended=1)
        mill.note_used(mill.tenants[taken], used)

    assert served["other"] > 3 * served["one"]  # its jobs were cancelled, and took nothing


def test_a_sated_worker_takes_a_newcomers_job_and_nobody_elses(
    mill: Mill, settings: Settings
) -> None:
    noisy = mill.push("noisy", 30)
    with taking(settings) as worker:
        worker.channel.queue_budgets = {QUEUE: 16}
        assert worker.take_all() == noisy[:16]

        [lone] = mill.push("lone", 1)

        assert worker.take_all() == [*noisy[:16], lone]


def test_a_sated_worker_takes_every_call_that_is_waited_for(mill: Mill, settings: Settings) -> None:
    noisy = mill.push(DEFAULT_TENANT, 30)
    with taking(settings) as worker:
        worker.channel.queue_budgets = {QUEUE: 16}
        assert worker.take_all() == noisy[:16]

        live = [mill.push(DEFAULT_TENANT, 1, priority=LIVE_PRIORITY)[0] for _ in range(3)]

        assert worker.take_all() == [*noisy[:16], *live]


def test_shares_hold_across_workers(mill: Mill, settings: Settings) -> None:
    mill.push("one", 40)
    mill.push("other", 40)
    with taking(settings, most=4) as first, taking(settings, most=4) as second:
        served: Counter[str] = Counter()
        for worker in (first, second) * 5:
            worker.channel.queue_budgets = {QUEUE: 4}
            worker.take_all()
            for message in worker.held:
                served[mill.tenants[message.headers["id"]]] += 1
                message.ack()
            worker.held.clear()

    assert served.total() >= 40
    assert abs(served["one"] - served["other"]) <= 6


def test_a_bell_that_died_with_who_heard_it_is_rung_again(
    mill: Mill, settings: Settings, client: redis.Redis
) -> None:
    [lone] = mill.push("lone", 1)
    client.delete(f"mill:{QUEUE}{mill.publisher.layout.sep}{BELL}")
    with taking(settings) as worker:
        worker.channel.queue_budgets = {QUEUE: 16}
        assert worker.take_all() == []

        mill.publisher.ring(["stub"])

        assert worker.take_all() == [lone]


def test_the_messages_of_tenants_are_counted_and_found(mill: Mill, publisher: Publisher) -> None:
    [first] = mill.push("one", 1)
    mill.push("other", 2, priority=9)
    lost = uuid4()

    assert publisher.queue_lengths(["stub"]) == {"stub": 3}
    last = publisher.list_lengths(["stub"], "other")["stub"][3]
    assert (last.all, last.own, last.tenants) == (2, 2, 1)
    assert publisher.without_message({UUID(first): "stub", lost: "stub"}) == {lost}
    assert publisher.unread() == {}


def test_what_a_worker_of_tenants_gives_back_is_taken_again(
    mill: Mill, settings: Settings, client: redis.Redis
) -> None:
    sent = mill.push("one", 5) + mill.push("other", 5)
    with taking(settings, most=6) as worker:
        worker.channel.queue_budgets = {QUEUE: 100}
        taken = worker.take_all()
        worker.held[0].ack()
    assert len(taken) == 6
    with taking(settings) as another:
        another.channel.queue_budgets = {QUEUE: 100}
        assert sorted(another.take_all()) == sorted(set(sent) - {taken[0]})


class Turns(RuleBasedStateMachine):
    """Whatever tenants send and take: every message comes once, each tenant's in order, a turn
    always serves somebody, and nobody waits for more turns than the rule says."""

    mill: Mill
    redis_: redis.Redis
    names = ("", "a", "b", "c")

    def __init__(self) -> None:
        super().__init__()
        self.redis_.flushdb()
        self.waiting: dict[str, deque[str]] = {}
        self.turns = 0
        self.waits_since: dict[str, int] = {}
        self.held: list[str] = []

    @initialize(weights=st.dictionaries(st.sampled_from("abc"), st.floats(1e-3, 1e3)))
    def weigh(self, weights: dict[str, float]) -> None:
        self.mill.publisher.set_weights(weights)

    @rule(name=st.sampled_from(names), number=st.integers(1, 8), together=st.integers(1, 5))
    def send(self, name: str, number: int, together: int) -> None:
        sent = self.mill.push(name or DEFAULT_TENANT, number, together)
        if not self.waiting.get(name):
            self.waits_since[name] = self.turns
        self.waiting.setdefault(name, deque()).extend(sent)

    @rule(jobs=st.integers(1, 12), only_new=st.booleans())
    def take(self, jobs: int, only_new: bool) -> None:
        before = self._waits()
        taken = self.mill.take(jobs, only_new)
        assert taken or only_new or not before
        for each in taken:
            tenant = self.mill.tenants[each]
            name = "" if tenant == DEFAULT_TENANT else tenant
            assert self.waiting[name].popleft() == each
            self.turns += not only_new
            self.waits_since[name] = self.turns
            self.held.append(each)
        most = PATIENT_SHARE * len(self.names)
        for name in self.names:
            if self.waiting.get(name):
                assert self.turns - self.waits_since[name] <= most

    @rule(ns=st.integers(0, 10_000_000_000))
    def end(self, ns: int) -> None:
        self.mill.used(self.held, ns)
        self.held = []

    @invariant()
    def is_counted(self) -> None:
        assert self.mill.publisher.queue_lengths(["stub"]) == {"stub": self._waits()}

    def _waits(self) -> int:
        return sum(map(len, self.waiting.values()))


def test_whatever_tenants_send_all_is_taken_once_and_nobody_starves(
    mill: Mill, client: redis.Redis
) -> None:
    machine = type("Bound", (Turns,), {"mill": mill, "redis_": client})
    run_state_machine_as_test(
        machine, settings=limits(max_examples=40, stateful_step_count=30, deadline=None)
    )
