"""What Prometheus reads at /metrics: jobs and queues as they are, requests as they went.

Durations are in seconds. Labels hold names from the configuration and the routes only, so that
their number is bounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import groupby
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.api.live.followers import Listeners
from app.api.live.waiting import Waiters
from app.books.energy import NJ_PER_J
from app.books.usage import Usage, hour_of
from app.broker.publisher import Publisher
from app.errors import GristmillError
from app.intake.outlook import Asked, Outlook
from app.intake.sender import Sender
from app.jobs import FINAL_STATES
from app.store import counts, usage
from app.store.database import Database
from app.store.tenancy import EVERYBODY, acting_for

NS_PER_S: Final = 1_000_000_000


class Metrics:
    """The registry of this process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "gristmill_http_request_seconds",
            "Time from the first byte of a request to the last of its answer; long polls too.",
            ["method", "route", "status"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30, 60),
            registry=self._registry,
        )
        self._submissions = Counter(
            "gristmill_submissions",
            "Jobs asked for: accepted, replayed (known by their key), or refused.",
            ["outcome"],
            registry=self._registry,
        )

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        known_method = method if method in ("GET", "HEAD", "POST") else "other"
        self._requests.labels(known_method, route, str(status)).observe(seconds)

    def count_submissions(self, outcome: str, num: int = 1) -> None:
        self._submissions.labels(outcome).inc(num)

    def register(self, collector: Collector) -> None:
        self._registry.register(collector)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format. Reads the database: not for the event loop."""
        return generate_latest(self._registry)


class SystemCollector(Collector):
    """Reads jobs from Postgres and queues from Redis when asked. What cannot be reached is left
    out, and its `up` is 0."""

    def __init__(
        self,
        database: Database,
        publisher: Publisher,
        sender: Sender,
        outlook: Outlook,
        waiters: Waiters,
        listeners: Listeners,
        models: Iterable[str],
    ) -> None:
        self._database = database
        self._publisher = publisher
        self._sender = sender
        self._outlook = outlook
        self._waiters = waiters
        self._listeners = listeners
        self._models = tuple(models)
        self._since: datetime | None = None  #: the hour in which this process was first asked

    def describe(self) -> Iterable[Metric]:
        return ()  # or registering would collect once

    def collect(self) -> Iterator[Metric]:
        yield from self._jobs()
        yield from self._queues()
        yield from self._etas()
        sent = CounterMetricFamily(
            "gristmill_messages", "Messages of new jobs.", labels=["outcome"]
        )
        sent.add_metric(["sent"], self._sender.num_sent)
        sent.add_metric(["left_to_rescue"], self._sender.num_left_to_rescue)
        yield sent
        yield GaugeMetricFamily(
            "gristmill_long_polls", "Long polls held.", self._waiters.num_waiting
        )
        yield GaugeMetricFamily(
            "gristmill_streams", "Listeners to the events of jobs.", self._listeners.num_listening
        )

    def _jobs(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("gristmill_postgres_up", "Whether Postgres answers.")
        try:
            with acting_for(EVERYBODY), self._database.begin() as connection:
                depths = counts.queue_depths(connection)
                ages = counts.oldest_queued_s(connection, self._models)
                prompts = counts.prompt_tokens(connection)
                self._since = self._since or hour_of(self._database.now())
                used = usage.totals(connection, self._since, self._models)
                drawn = usage.drawn_nj(connection, self._since)
        except GristmillError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        jobs = GaugeMetricFamily(
            "gristmill_jobs", "Jobs that are not final.", labels=["model", "state"]
        )
        for depth in depths:
            jobs.add_metric([depth.model, depth.state], depth.num_jobs)
        yield jobs
        oldest = GaugeMetricFamily(
            "gristmill_oldest_queued_seconds", "Age of the oldest queued job.", labels=["model"]
        )
        for model in self._models:
            oldest.add_metric([model], ages.get(model, 0.0))
        yield oldest
        tokens = GaugeMetricFamily(
            "gristmill_prompt_tokens_last_minute",
            "Prompt tokens of the answers of the last minute: computed, or found in a cache.",
            labels=["model", "came_from"],
        )
        for model, (computed, cached) in prompts.items():
            tokens.add_metric([model, "compute"], computed)
            tokens.add_metric([model, "cache"], cached)
        yield tokens
        yield from _used(used)
        energy = CounterMetricFamily(
            "gristmill_energy_joules", "Energy of devices, by what it was for.", labels=["use"]
        )
        for use, nj in drawn.items():
            energy.add_metric([use], nj / NJ_PER_J)
        yield energy

    def _etas(self) -> Iterator[Metric]:
        ended = GaugeMetricFamily(
            "gristmill_eta_jobs",
            "Jobs that were promised an end and have ended: those that the share is of.",
            labels=["model"],
        )
        share = GaugeMetricFamily(
            "gristmill_eta_kept_share",
            "Of these, the part that ended within the p90 it was promised.",
            labels=["model"],
        )
        for model, (num_jobs, kept) in self._outlook.kept().items():
            ended.add_metric([model], num_jobs)
            share.add_metric([model], kept)
        yield ended
        yield share
        start = GaugeMetricFamily(
            "gristmill_eta_start_seconds",
            "Time until a job of priority 0 that comes now is begun; absent if nobody can say.",
            labels=["model", "quantile"],
        )
        asked = [Asked(model, 0, None, None, None) for model in self._models]
        for job in asked:
            [forecast] = self._outlook.expected([job])
            if forecast.eta:
                start.add_metric([job.model, "0.5"], forecast.eta.start_p50_s)
                start.add_metric([job.model, "0.9"], forecast.eta.start_p90_s)
        yield start

    def _queues(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("gristmill_redis_up", "Whether Redis takes messages.")
        try:
            self._sender.try_to_send()
        except GristmillError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        try:
            lengths = self._publisher.queue_lengths(self._models)
        except GristmillError:
            return
        messages = GaugeMetricFamily(
            "gristmill_queue_messages", "Messages waiting in Redis.", labels=["model"]
        )
        for model, length in lengths.items():
            messages.add_metric([model], length)
        yield messages
        unread = GaugeMetricFamily(
            "gristmill_unread_messages",
            "Messages in Redis in lists that no worker with these settings reads.",
            labels=["list"],
        )
        with contextlib.suppress(GristmillError):
            for key, length in self._publisher.unread().items():
                unread.add_metric([key], length)
            yield unread


def _used(rows: Iterable[Usage]) -> Iterator[Metric]:
    """Counters of what ended jobs used, from the sums of the whole system. They begin anew with
    each process, as counters do."""
    ended = CounterMetricFamily(
        "gristmill_ended_jobs", "Jobs that ended, by their final state.", labels=["model", "state"]
    )
    given = CounterMetricFamily(
        "gristmill_input_tokens", "Tokens of prompts, cached ones included.", labels=["model"]
    )
    cached = CounterMetricFamily(
        "gristmill_cached_tokens", "Of these, found in a prefix cache.", labels=["model"]
    )
    generated = CounterMetricFamily(
        "gristmill_output_tokens", "Tokens generated.", labels=["model"]
    )
    device = CounterMetricFamily(
        "gristmill_device_seconds", "Device time billed.", labels=["model"]
    )
    cost = CounterMetricFamily(
        "gristmill_cost", "What jobs were charged.", labels=["model", "currency"]
    )
    by_model = sorted(rows, key=lambda row: str(row.group["model"]))
    for model, group in groupby(by_model, key=lambda row: str(row.group["model"])):
        of_model = list(group)
        for state in sorted(FINAL_STATES):
            ended.add_metric([model, state], sum(row.jobs[state] for row in of_model))
        given.add_metric([model], sum(row.input_tokens for row in of_model))
        cached.add_metric([model], sum(row.cached_tokens for row in of_model))
        generated.add_metric([model], sum(row.output_tokens for row in of_model))
        device.add_metric([model], sum(row.device_ns for row in of_model) / NS_PER_S)
        for row in of_model:
            if row.currency is not None:
                cost.add_metric([model, row.currency], float(row.cost))
    yield from (ended, given, cached, generated, device, cost)
