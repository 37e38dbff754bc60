"""The engine `openai`: sequences go to upstreams, and their answers come back as generations.

A thread of its own has an event loop with a task for each sequence inside. A task waits for its
turn, asks one upstream, and asks again if that was in vain:

    refused (400, 422, …)         the sequence fails, alone
    overloaded (429, 503)         later, at the same or another one; for as long as it takes
    not reached, or not let in    the same
    lost: reset, silent, broken   again, and from the second time on alone at its upstream, for it
                                  may be what that dies of; `LOSSES_ALONE` losses there end it

So a job waits for an upstream that is away as it waits for a worker: its deadline, its time limit
and a cancel end it. An answer counts once, since one task alone makes a sequence's generation, and
the claim's fence stands behind it as behind any engine's.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from app.config.settings import ModelSettings
from app.engines.base import Generation, NewTokens, Progress, Sequence
from app.engines.joining import JoiningEngine
from app.engines.openai import balance
from app.engines.openai.answer import Answer, Denied, Lost, Overloaded, Refused, Unreachable
from app.engines.openai.balance import Load
from app.engines.openai.exchange import ask, client_of, tls
from app.engines.openai.options import NO_FILES, Options, Upstream
from app.engines.openai.request import request_of
from app.errors import ConfigError, RequestError
from app.jobs import FinishReason
from app.threads import Background, place_of

log = logging.getLogger(__name__)

STEP_S: Final = 0.01
"""Longest that a step waits for an answer: whoever is to be admitted waits as long."""
COMPANY_LOSSES: Final = 2
"""Losses after which a request is suspected, and runs alone at its upstream."""
LOSSES_ALONE: Final = 3
DENIED_PAUSE_S: Final = 30.0
GREET_S: Final = 5.0


@dataclass(slots=True, eq=False)
class _Server:
    """An upstream with its connections."""

    upstream: Upstream
    load: Load
    client: httpx.AsyncClient


@dataclass(slots=True, eq=False)
class _Row:
    """A sequence inside."""

    sequence: Sequence
    batch_id: str
    arrival: int
    generation: Generation
    path: str
    body: dict[str, Any]
    answer: Answer = field(default_factory=Answer)
    losses: int = 0
    losses_alone: int = 0
    turn: asyncio.Future[_Server] | None = None
    task: asyncio.Task[None] | None = None

    @property
    def is_suspect(self) -> bool:
        return self.losses >= COMPANY_LOSSES

    @property
    def urgency(self) -> tuple[bool, int, int]:
        """Suspects first: what is behind one must not wait for it for ever."""
        return (not self.is_suspect, self.sequence.priority, self.arrival)


class OpenAiEngine(JoiningEngine):
    """Sequences run at servers elsewhere. Implements `base.Engine`."""

    kernels: Final = "an upstream's"

    def __init__(
        self, folder: Path, settings: ModelSettings, device: str, threads: int, progress: Progress
    ) -> None:
        super().__init__()
        self._options = Options.of(settings)
        _greet(self._options)
        self._as_text = settings.source == NO_FILES
        self._most = settings.max_batch_size
        self._progress = progress
        self._rows: dict[int, _Row] = {}  #: the stepping thread's
        self._arrivals = 0
        self._ended: queue.SimpleQueue[Generation] = queue.SimpleQueue()
        # From here on the loop's alone.
        self._waiting: list[_Row] = []
        self._cancelled: set[int] = set()  #: that have not come yet
        self._servers = [
            _Server(each, Load(each.weight, self._most), self._client(each))
            for each in self._options.servers()
        ]
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = Background("upstream", self._loop.run_forever, max_failures=1)
        self._thread.start()

    def _client(self, upstream: Upstream) -> httpx.AsyncClient:
        return client_of(upstream, self._options.timeout_s, self._most)

    # ── the stepping thread ──────────────────────────────────────────────────────────────────

    def admit(self, batch_id: str, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            now = time.monotonic_ns()
            generation = Generation(
                sequence.id,
                FinishReason.ERROR,
                input_tokens=len(sequence.prompt_token_ids),
                started_ns=now,
                finished_ns=now,
            )
            path = ""
            body: dict[str, Any] = {}
            try:
                path, body = request_of(sequence, self._options, as_text=self._as_text)
            except RequestError as error:
                generation.error_code, generation.error_message = error.code, error.message
            row = _Row(sequence, batch_id, self._arrivals, generation, path, body)
            self._arrivals += 1
            self._rows[sequence.id] = row
            if path:
                self._loop.call_soon_threadsafe(self._start, row)
            else:
                self._ended.put(generation)

    def step(self) -> list[Generation]:
        """Wait for answers, a moment at most."""
        ended: list[Generation] = []
        try:
            ended.append(self._ended.get(timeout=STEP_S))
            while True:
                ended.append(self._ended.get_nowait())
        except queue.Empty:
            pass
        for generation in ended:
            row = self._rows.pop(generation.sequence_id)
            self._count(row)
            if row.sequence.stream and (generation.text or generation.token_ids):
                tokens, scored = (*generation.token_ids,), (*(generation.logprobs or ()),)
                new = NewTokens(row.sequence.id, tokens, generation.text, scored)
                self._new_tokens.append(new)
        self._progress()
        return ended

    def _count(self, row: _Row) -> None:
        stats = self._stats_of(row.batch_id)
        stats.rows += 1
        tokens = row.generation.input_tokens + row.generation.output_tokens
        stats.useful_tokens += tokens
        stats.padded_tokens += tokens

    def cancel(self, sequence_id: int) -> None:
        self._loop.call_soon_threadsafe(self._cancel, sequence_id)

    @property
    def has_work(self) -> bool:
        return bool(self._rows)

    @property
    def free_rows(self) -> int:
        return self._most - len(self._rows)

    def close(self) -> None:
        self._rows.clear()
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ── the loop ─────────────────────────────────────────────────────────────────────────────

    async def _hang_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers:
            await server.client.aclose()

    def _start(self, row: _Row) -> None:
        row.task = self._loop.create_task(self._run(row))
        row.task.add_done_callback(lambda task: self._end(row, is_cancelled=task.cancelled()))
        if row.sequence.id in self._cancelled:
            row.task.cancel()

    def _cancel(self, sequence_id: int) -> None:
        row = self._rows.get(sequence_id)
        if row is not None and row.task is not None:
            row.task.cancel()
        else:  # it may come yet
            self._cancelled.add(sequence_id)

    def _end(self, row: _Row, *, is_cancelled: bool) -> None:
        self._cancelled.discard(row.sequence.id)
        if is_cancelled:
            _fill(row)
            row.generation.finish_reason = FinishReason.CANCELLED
        row.generation.finished_ns = time.monotonic_ns()
        self._ended.put(row.generation)

    async def _run(self, row: _Row) -> None:
        """A sequence from its first try to its generation, whatever happens but a cancel."""
        try:
            while not await self._try(row):
                pass
            _fill(row)
            row.generation.charge = row.answer.cost if self._options.charges else None
            if row.answer.finish_reason is FinishReason.ERROR:
                _fail(row, "upstream_ended", f"The upstream ended the answer: {row.answer.end}.")
        except Refused as error:
            told = f", {error.code}" if error.code else ""
            said = f"The upstream refused the request ({error.status}{told})."
            _fail(row, "invalid_request", said)
        except Lost as error:
            said = f"The upstream gave no answer, {row.losses} times: {error}."
            _fail(row, "upstream_failed", said)
        except Exception as error:  # a bug here is this row's affair
            log.error("A request could not be run: %s", place_of(error))
            _fail(row, "engine_error", "The request could not be run.")

    async def _try(self, row: _Row) -> bool:
        """Whether the answer has come. Raises `Refused`, and `Lost` when that is final."""
        server = await self._turn(row)
        load, began_ns, alone = server.load, time.monotonic_ns(), row.is_suspect
        row.answer = Answer(_most_pieces(row))
        try:
            await ask(server.client, row.path, row.body, row.answer, _logprobs(row))
        except Overloaded as error:
            load.overloaded(began_ns, time.monotonic_ns(), error.asked_s)
            return False
        except Denied as error:
            self._complain(server, f"It does not let us in, or has no such model: {error}.")
            load.overloaded(began_ns, time.monotonic_ns(), DENIED_PAUSE_S)
            return False
        except Unreachable as error:
            self._complain(server, f"It cannot be reached ({error}).")
            load.failed(time.monotonic_ns())
            return False
        except Lost as error:
            self._complain(server, f"An answer was lost: {error}.")
            load.failed(time.monotonic_ns())
            row.losses += 1
            row.losses_alone += alone
            if row.losses_alone >= LOSSES_ALONE:
                raise
            return False
        except Refused:
            load.succeeded()  # it is well
            raise
        else:
            load.succeeded()
            return True
        finally:
            load.end()
            self._hand_out()

    def _complain(self, server: _Server, sentence: str) -> None:
        """Once for each time that it is left alone, not for each of its requests."""
        if server.load.resumes_ns <= time.monotonic_ns():
            where = httpx.URL(server.upstream.url).host
            log.warning("Upstream %s: %s", where, sentence, extra={"action": "upstream_trouble"})

    async def _turn(self, row: _Row) -> _Server:
        """Wait until an upstream is this row's to ask."""
        row.turn = self._loop.create_future()
        self._waiting.append(row)
        self._hand_out()
        try:
            return await row.turn
        except asyncio.CancelledError:
            if row in self._waiting:
                self._waiting.remove(row)
            if not row.turn.cancelled():
                row.turn.result().load.end()
            self._hand_out()
            raise

    def _hand_out(self) -> None:
        """Give turns, the most urgent first. A suspect whose upstreams are not empty yet holds up
        those behind it: else they never would be."""
        now_ns = time.monotonic_ns()
        by_load = {server.load: server for server in self._servers}
        self._waiting.sort(key=lambda row: row.urgency)
        while self._waiting:
            row = self._waiting[0]
            assert row.turn is not None
            if row.turn.cancelled():  # it leaves by itself
                self._waiting.pop(0)
                continue
            load = balance.choose([*by_load], now_ns, alone=row.is_suspect)
            if load is None:
                break
            self._waiting.pop(0)
            load.begin(alone=row.is_suspect)
            row.turn.set_result(by_load[load])
        self._set_timer([*by_load], now_ns)

    def _set_timer(self, loads: list[Load], now_ns: int) -> None:
        """Come back when an upstream that is spared now may be asked again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        resume_ns = balance.next_resume_ns(loads, now_ns)
        if self._waiting and resume_ns is not None:
            self._timer = self._loop.call_later((resume_ns - now_ns) / 1e9, self._hand_out)


def _greet(options: Options) -> None:
    """Find out at start whether the keys are taken. An upstream that is away is waited for.

    Raises `ConfigError` if one is not.
    """
    for upstream in options.servers():
        key, host = upstream.key(), httpx.URL(upstream.url).host
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            url = upstream.url.rstrip("/") + "/models"
            status = httpx.get(url, headers=headers, timeout=GREET_S, verify=tls()).status_code
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            log.warning("Upstream %s cannot be reached yet (%s).", host, type(error).__name__)
            continue
        if status in (401, 403):
            raise ConfigError(
                f"The upstream {host} does not take the key that it is sent ({status})."
            )


def _most_pieces(row: _Row) -> int:
    """A token may come in two; a few more say nothing."""
    params = row.sequence.params
    return 2 * params.max_tokens + 100 if params else 1


def _logprobs(row: _Row) -> int:
    return (row.sequence.params.logprobs or 0) if row.sequence.params else 0


def _fill(row: _Row) -> None:
    """Put what has come into the generation."""
    answer, generation = row.answer, row.generation
    generation.finish_reason = answer.finish_reason
    generation.text = answer.text
    generation.token_ids = answer.token_ids
    generation.embedding = answer.embedding
    generation.first_token_ns = answer.began_ns
    if answer.logprobs:
        generation.logprobs = answer.logprobs
    if answer.input_tokens is not None:
        generation.input_tokens = answer.input_tokens
        generation.cached_tokens = answer.cached_tokens
    if row.sequence.params is not None and answer.output_tokens != len(answer.token_ids):
        known = answer.output_tokens
        generation.counted_tokens = answer.num_pieces if known is None else known


def _fail(row: _Row, code: str, message: str) -> None:
    row.generation.finish_reason = FinishReason.ERROR
    row.generation.error_code, row.generation.error_message = code, message
