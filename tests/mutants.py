"""`python -m tests.mutants`: deliberate defects in the product, each of which some test must catch.

Every defect is a few words of the source replaced, in a copy of the tree in which the tests that
should notice are then run. Words that do not occur exactly once are an error: a list of defects
that no longer apply would prove nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
COPIED: Final = ("app", "clients", "configs", "migrations", "tests", "pyproject.toml", "README.md")
SIMULATION: Final = "tests/simulation/test_schedules.py"
AHEAD: Final = "tests/simulation/test_ahead.py"
TAKES: Final = "tests/simulation/test_takes.py"
ENDS: Final = "tests/unit/test_engine_ends.py"
CLAIMS: Final = "tests/integration/test_store_claims.py"
ODD: Final = "tests/integration/test_odd_data.py"
ODD_MESSAGES: Final = f"{ODD}::test_no_message_ends_the_worker_or_keeps_others_from_their_end"
ODD_ROWS: Final = f"{ODD}::test_no_row_ends_the_worker_or_keeps_others_from_their_end"
ETA: Final = "app/books/eta.py"
CALIBRATION: Final = "app/books/calibration.py"
ETAS: Final = "tests/unit/test_eta.py"
BOOKS: Final = "tests/unit/test_books.py"
ACCOUNT: Final = "app/worker/account.py"
ACCOUNTS: Final = "tests/unit/test_account.py"
AUDIT: Final = "tests/integration/test_store_audit.py"
STORE: Final = "app/store/claims.py"
RELEASES: Final = "app/store/releases.py"
ENERGY: Final = "tests/unit/test_energy.py"
ARRIVALS: Final = "app/worker/pool/arrivals.py"
ANY_MESSAGE: Final = "tests/unit/test_any_message.py"
FETCHING: Final = "app/broker/fetching.py"
LANES: Final = "app/broker/lanes.py"
SHARES: Final = "tests/integration/test_broker_lanes.py"
FETCHES: Final = "tests/integration/test_broker_fetching.py"
SETTLING: Final = "tests/unit/test_settling.py"
SAMPLING: Final = "app/engines/sampling/sampler.py"
CREW: Final = "app/engines/inflight/crew.h"
CREWS: Final = "tests/unit/test_inflight_crew.py"
BATCHES: Final = "tests/unit/test_batches.py"
USAGE: Final = "tests/integration/test_store_usage.py"
ADDRESSES: Final = "tests/unit/test_webhook_addresses.py"
POSTS: Final = "tests/unit/test_webhook_post.py"
WEBHOOKS: Final = "tests/integration/test_webhooks.py"


@dataclass(frozen=True, slots=True)
class Mutant:
    defect: str
    file: str
    old: str
    new: str
    tests: str = SIMULATION  #: a file, or a file::test


STORED_CHATS: Final = "app/store/stored_chats.py"
STORED: Final = "tests/integration/test_openai_stored_chats.py"
RESPONSES: Final = "tests/integration/test_openai_responses.py"
RESPONSE_STREAM: Final = "app/api/openai/response_stream.py"
RESPONSE_STREAMS: Final = "tests/unit/test_response_stream.py"

MUTANTS: Final = (
    Mutant(
        "a hole in a stream is told as if it were none",
        "app/broker/events.py",
        "entry.id != self.after.next:",
        "entry.id < self.after.next:",
        "tests/unit/test_job_events.py",
    ),
    Mutant(
        "tokens of a run that was given up are told",
        "app/broker/events.py",
        "new[starts[-1] if starts else 0 :]",
        "new[starts[0] if starts else 0 :]",
        "tests/unit/test_job_events.py",
    ),
    Mutant(
        "an old attempt's end takes the new one's stream along",
        "app/worker/streams.py",
        "stream is not None and stream.next.attempt == leave.attempt",
        "stream is not None",
        "tests/unit/test_token_streams.py",
    ),
    Mutant(
        "an engine that is lost begins its numbers anew",
        "app/worker/streams.py",
        "if before.next.attempt == first.attempt:",
        "if before.next.attempt > first.attempt:",
        "tests/unit/test_token_streams.py",
    ),
    Mutant(
        "tokens behind a hole are told",
        "app/worker/streams.py",
        "is None or owner[0].is_broken:",
        "is None:",
        "tests/unit/test_token_streams.py",
    ),
    Mutant(
        "a listener that comes late has not what was told before",
        "app/api/live/followers.py",
        "self.is_behind = not is_first",
        "self.is_behind = False",
        "tests/unit/test_api_listeners.py",
    ),
    Mutant(
        "an engine tells nobody whose tokens it dropped",
        "app/worker/engine/outlet.py",
        "self._lost.update((each[0] for each in fresh), ended)",
        "pass",
        "tests/unit/test_token_streams.py",
    ),
    Mutant(
        "where a streamed text is cut depends on how it came",
        "app/requests/response_events.py",
        "if found.end() == len(text) and not is_whole:",
        "if False:",
        "tests/unit/test_response_events.py",
    ),
    Mutant(
        "a streamed response is told again from the first word when its worker is lost",
        RESPONSE_STREAM,
        "if event.is_restart:",
        "if False:",
        RESPONSE_STREAMS,
    ),
    Mutant(
        "a streamed job draws another answer when it runs again",
        "app/worker/work.py",
        "params=replace(params, seed=int64(self.id.int))",
        "params=params",
        RESPONSE_STREAMS,
    ),
    Mutant(
        "a stream that is resumed repeats the event that was had",
        RESPONSE_STREAM,
        'event["sequence_number"] > after',
        'event["sequence_number"] >= after',
        f"{RESPONSES}::test_a_stream_is_resumed_after_any_event_in_both_ways",
    ),
    Mutant(
        "a response that is not to be stored is",
        "app/api/openai/responses.py",
        "if not is_stored:",
        "if False:",
        f"{RESPONSES}::test_what_is_not_to_be_stored_is_told_once",
    ),
    Mutant(
        "a chat that was not to be stored is told of",
        STORED_CHATS,
        '"results.stored AND results.response',
        '"results.response',
        f"{STORED}::test_a_chat_that_was_not_stored_is_not_told_of",
    ),
    Mutant(
        "a client is not told that a thread cannot be kept, and does not go on without",
        "app/api/envelopes.py",
        '"body.thread": {',
        '"thread": {',
        "tests/integration/test_anthropic_calls.py"
        "::test_a_thread_that_may_go_on_without_is_told_whole",
    ),
    Mutant(
        "a stored chat is told to another tenant",
        STORED_CHATS,
        "ANY(CAST(:ids AS uuid[])) AND job_keys.tenant = :tenant",
        "ANY(CAST(:ids AS uuid[]))",
        "tests/integration/test_store_stored_chats.py::test_a_stored_chat_is_its_tenants_in_each_statement",
    ),
    Mutant(
        "more of a conversation is left out than is too long",
        "app/requests/prepare.py",
        "while fits - too_long > 1:",
        "while False:",
        "tests/unit/test_responses.py",
    ),
    Mutant(
        "a private address is reached by its IPv6 form",
        "app/webhooks/addresses.py",
        "    address = carried(address)\n    if any(address in network for network in (*NEVER,",
        "    if any(address in network for network in (*NEVER,",
        ADDRESSES,
    ),
    Mutant(
        "a name is judged by the first of its addresses",
        "app/webhooks/addresses.py",
        "        for address in addresses:",
        "        for address in addresses[:1]:",
        ADDRESSES,
    ),
    Mutant(
        "a network that the operator allows may tell a machine its secrets",
        "app/webhooks/addresses.py",
        "        if any(address in network for network in NEVER):\n            return False\n",
        "",
        ADDRESSES,
    ),
    Mutant(
        "a webhook goes to its name and not to the address that was checked",
        "app/webhooks/post.py",
        "str(address), self._url.port",
        "self._url.host, self._url.port",
        POSTS,
    ),
    Mutant(
        "a redirect counts as delivered",
        "app/webhooks/post.py",
        "not 200 <= status < 300:",
        "not 200 <= status < 400:",
        POSTS,
    ),
    Mutant(
        "an event has another id at each attempt",
        "app/hooks.py",
        "name_of(EVENT, due.event_id)",
        "name_of(EVENT, due.lease)",
        WEBHOOKS,
    ),
    Mutant(
        "an attempt is recorded by who has lost its lease",
        "app/store/webhooks.py",
        "        WHERE webhook_deliveries.lease = given.lease\n",
        "        WHERE true\n",
        WEBHOOKS,
    ),
    Mutant(
        "the schedule of a webhook begins anew with each attempt",
        "app/hooks.py",
        "wait_s(due.tries, age_s,",
        "wait_s(1, age_s,",
        WEBHOOKS,
    ),
    Mutant(
        "a promise that was broken makes the next ones shorter",
        CALIBRATION,
        "margin += STEP",
        "margin -= STEP",
        ETAS,
    ),
    Mutant(
        "an idle hour counts as much as a full queue when the pace is taken",
        ETA,
        "counts = max(0.0, queue) * (until_s - at_s)",
        "counts = (until_s - at_s)",
        ETAS,
    ),
    Mutant(
        "p50 and p90 are not compared with what jobs took of their estimates",
        CALIBRATION,
        "ratios = [(score.took_s / score.estimate_s, score.weight) for score in piece]",
        "ratios = [(1.0, score.weight) for score in piece]",
        ETAS,
    ),
    Mutant(
        "jobs that are more urgent are not ahead",
        "app/intake/outlook.py",
        "for other in range(self._layout.step(LIVE_PRIORITY), step):",
        "for other in range(0):",
        "tests/integration/test_api_outlook.py",
    ),
    Mutant(
        "what a job was promised is lost when it ends",
        "app/store/results.py",
        '"max_attempts", "quoted_ms",\n    "quoted_p90_ms", "attempt"',
        '"max_attempts", "attempt"',
        "tests/integration/test_api_outlook.py",
    ),
    Mutant(
        "a comparison is held against one over other prompts",
        "app/store/comparisons.py",
        "AND prompts_digest = :prompts_digest AND machine",
        "AND machine",
        "tests/integration/test_compare.py",
    ),
    Mutant(
        "a guard that had nothing to compare lets pass",
        "app/cli/verify.py",
        "if good and all(good)",
        "if all(good)",
        "tests/integration/test_compare.py",
    ),
    Mutant(
        "who goes first in a comparison always does",
        "app/trials/compare.py",
        """(("a", "b"), ("b", "a"))""",
        """(("a", "b"), ("a", "b"))""",
        "tests/unit/test_compare.py",
    ),
    Mutant(
        "a reading of an answer begins one token late",
        "app/trials/verify.py",
        "[len(asked.tokens) - 1 :]",
        "[len(asked.tokens) :]",
        "tests/unit/test_verify.py",
    ),
    Mutant(
        "a bound on a difference holds from below",
        "app/trials/agreement.py",
        "else value <= self.limit",
        "else value >= self.limit",
        "tests/unit/test_agreement.py",
    ),
    Mutant(
        "of two ways to run a model the better one counts",
        "app/trials/agreement.py",
        "worse = min if MEASURES[name].is_share else max",
        "worse = max if MEASURES[name].is_share else min",
        "tests/unit/test_agreement.py",
    ),
    Mutant(
        "finish is not fenced",
        STORE,
        """ AND job.attempt_id = given.attempt_id
    ), gone AS""",
        """
    ), gone AS""",
        CLAIMS,
    ),
    Mutant(
        "a late zombie writes over its attempt's record",
        STORE,
        "device_ns = coalesce(attempts.device_ns, given.device_ns)",
        "device_ns = given.device_ns",
        CLAIMS,
    ),
    Mutant(
        "what a zombie took is in no book",
        STORE,
        "ELSE greatest(attempts.wasted_ns, given.device_ns + given.wasted_ns) END",
        "ELSE attempts.wasted_ns END",
        CLAIMS,
    ),
    Mutant(
        "what is given back is billed",
        RELEASES,
        "error_code = next.error_code, device_ns = 0, wasted_ns = next.wasted_ns, cost = 0",
        "error_code = next.error_code, device_ns = next.wasted_ns, wasted_ns = 0, cost = 0",
        CLAIMS,
    ),
    Mutant(
        "a batch does not count what was given back",
        "app/worker/ledger.py",
        "                    _batches_of(jobs),\n",
        "",
    ),
    Mutant(
        "answers that an engine dropped are billed",
        "app/worker/work.py",
        "        self.wasted_ns += self.device_ns + took_ns\n        self.device_ns = 0\n",
        "        self.wasted_ns += took_ns\n",
    ),
    Mutant(
        "what was inside a dead engine took no time",
        "app/worker/running.py",
        "max(0, spent_ns - self.told_ns) if self._owners else 0",
        "0",
    ),
    Mutant(
        "a step that did not fit took no time",
        "app/worker/executor.py",
        "self._halve(dropped, took_ns)",
        "self._halve(dropped, 0)",
    ),
    Mutant(
        "claim ignores not_before",
        STORE,
        "AND locked.not_before <= now() AND",
        "AND",
        CLAIMS,
    ),
    Mutant(
        "claim ignores the worker's lease",
        STORE,
        "            AND (SELECT is_held FROM lease)\n",
        "",
        CLAIMS,
    ),
    Mutant(
        "a released job forgets its cancel",
        RELEASES,
        "WHEN cancel_requested_at IS NOT NULL THEN 'cancelled'",
        "WHEN false THEN 'cancelled'",
        CLAIMS,
    ),
    Mutant(
        "finish tells nobody",
        "app/worker/ledger.py",
        "notices.ended([job.id for job in over])",
        "None",
        f"{SIMULATION}"
        "::test_a_world_without_faults_answers_every_good_prompt_and_tells_those_who_wait",
    ),
    Mutant(
        "what follows a commit is part of it",
        "app/store/database.py",
        "                pipeline._enqueue_sync()",
        "                pass",
        "tests/integration/test_store_database.py",
    ),
    Mutant(
        "news that fails is taken for data that is refused",
        "app/store/database.py",
        "        if cursor.pgresult:\n            link.close()",
        "        if cursor.pgresult:\n            pass",
        "tests/integration/test_store_database.py",
    ),
    Mutant(
        "jobs beyond those that one notification holds are told to nobody",
        "app/store/notices.py",
        "GROUP BY place / {MAX_IDS}",
        "WHERE place < {MAX_IDS} GROUP BY place / {MAX_IDS}",
        "tests/integration/test_store_notices.py",
    ),
    Mutant(
        "a cancel is told to no worker",
        "app/api/services.py",
        "self.submitter.sender.tell_cancelled(told)",
        "pass",
        "tests/integration/test_broker_cancels.py::"
        "test_a_cancel_over_http_reaches_the_running_job"
        "_and_a_worker_keeps_one_connection_to_postgres",
    ),
    Mutant(
        "a cancel wakes every worker",
        "app/broker/cancels.py",
        'CHANNELS.replace("*", str(worker_id))',
        'CHANNELS.replace("*", "all")',
        "tests/integration/test_broker_cancels.py::"
        "test_a_cancel_wakes_the_worker_that_runs_the_job_and_no_other",
    ),
    Mutant(
        "a heartbeat revives a stopped worker",
        "app/store/workers.py",
        """now() + :lease_s * interval '1 s'
    WHERE id = :worker_id AND stopped_at IS NULL""",
        """now() + :lease_s * interval '1 s'
    WHERE id = :worker_id""",
        "tests/integration/test_store_sweeps.py",
    ),
    Mutant(
        "the idempotency key is not kept",
        "app/store/submissions.py",
        "SELECT id, tenant, decode(fingerprint, 'hex'), idempotency_key, replay_of, now()",
        "SELECT id, tenant, decode(fingerprint, 'hex'), NULL, replay_of, now()",
        "tests/integration/test_store_submissions.py",
    ),
    Mutant(
        "each job of a page is marked as sent",
        "app/store/delivery.py",
        "(CAST(:sent AS bool[]))[ordinality]",
        "(CAST(:sent AS bool[]))[1]",
        "tests/integration/test_store_contract.py",
    ),
    Mutant(
        "to receive a message reads the keys of all jobs",
        "app/store/submissions.py",
        "decode(asked.fingerprint, 'hex') IS DISTINCT FROM (\n"
        "        SELECT fingerprint FROM job_keys WHERE job_keys.id = asked.id\n    )",
        "NOT EXISTS (\n        SELECT FROM job_keys WHERE job_keys.id = asked.id\n"
        "            AND fingerprint = decode(asked.fingerprint, 'hex')\n    )",
        "tests/integration/test_store_plans_stale.py",
    ),
    Mutant(
        "rescue sends without marking it",
        "app/store/delivery.py",
        "UPDATE open_jobs SET enqueued_at = now() FROM due",
        "UPDATE open_jobs SET enqueued_at = NULL FROM due",
        "tests/integration/test_rescue.py::test_a_job_whose_message_was_never_sent_is_sent_once",
    ),
    Mutant(
        "rescue forgets what dead workers had received",
        "app/rescue.py",
        "lambda name: self._pages.repeat(name, delivery.free_lost, MAX_PAGES)",
        "lambda name: 0",
    ),
    Mutant(
        "rescue forgets the jobs of dead workers",
        "app/rescue.py",
        "lambda name: self._pages.move(name, sweeps.find_lost, sweeps.expire_leases, MAX_PAGES)",
        "lambda name: 0",
    ),
    Mutant(
        "rescue calls workers lost that it was cut off with",
        "app/rescue.py",
        "if self._contact.lasts_s < self._lease_s:",
        "if False:",
        "tests/integration/test_rescue.py"
        "::test_nobody_is_lost_before_rescue_has_been_connected_for_a_lease",
    ),
    Mutant(
        "a repeated claim of a lost attempt is an error",
        STORE,
        "ON CONFLICT (id, created_at) DO NOTHING  -- opened",
        "-- opened",
        CLAIMS,
    ),
    Mutant(
        "conditions go into the lookup by id",
        "app/store/lookup.py",
        "open_jobs.id = {job_id} OFFSET 0",
        "open_jobs.id = {job_id}",
        "tests/integration/test_store_plans.py::test_the_leases",
    ),
    Mutant(
        "a page that holds a row which cannot be moved is given up",
        "app/store/pages.py",
        "moved += self._move_parts(name, move, found, error)",
        "pass",
        "tests/integration/test_rescue.py::test_a_row_that_cannot_be_moved_keeps_no_other_waiting",
    ),
    Mutant(
        "rescue forgets messages that Redis lost",
        "app/rescue.py",
        "sent_again=self._send_missing()",
        "sent_again=0",
    ),
    Mutant(
        "success is told before the commit",
        "app/worker/executor.py",
        "self._dispatcher.note_ran(job)",
        'job.ticket.succeeded("", 0.0)',
    ),
    Mutant(
        "all that an engine held when it died are guilty",
        "app/worker/executor.py",
        "        if suspects == [solo]:\n            run = suspects[0].claimed_run\n",
        "        for run in [job.claimed_run for job in suspects]:\n",
    ),
    Mutant(
        "a claim whose answer was lost is forgotten",
        "app/worker/runner.py",
        "self._claiming = (batch, jobs)",
        "self._claiming = None",
    ),
    Mutant(
        "a take whose answer was lost is forgotten",
        "app/worker/runner.py",
        "            self._taking = take\n            self._finish_take()\n",
        "            self._taking = take\n            try:\n                self._finish_take()\n"
        "            finally:\n                self._taking = None\n",
        TAKES,
    ),
    Mutant(
        "what may have been taken is forgotten with the rest",
        "app/worker/registrar.py",
        "        self._waiting.clear()\n        self._has_forgotten =",
        "        self._waiting.clear()\n        self._taking.clear()\n"
        "        self._has_forgotten =",
        TAKES,
    ),
    Mutant(
        "messages of jobs that were not taken are forgotten",
        "app/worker/registrar.py",
        "self._waiting = [*left, *self._waiting]",
        "pass",
        TAKES,
    ),
    Mutant(
        "a suspect is taken",
        STORE,
        'f" AND locked.losses < {SUSPECT_AFTER}"',
        '""',
        "tests/integration/test_store_takes.py",
    ),
    Mutant(
        "what is taken belongs to any model",
        STORE,
        "AND locked.model = :model AND",
        "AND",
        "tests/integration/test_store_takes.py",
    ),
    Mutant(
        "suspects run beside healthy work",
        "app/worker/dispatcher.py",
        "        if self._suspects or self._runs_apart:\n            return {}\n",
        "",
        "tests/simulation/test_schedules.py::"
        "test_healthy_jobs_are_never_beside_the_suspects_of_a_crash",
    ),
    Mutant(
        "jobs of a flushed connection stay received",
        "app/worker/runner.py",
        "            del self._jobs[job.id]\n            self._registrar.give_back(job.id)\n",
        "            del self._jobs[job.id]\n",
        "tests/simulation/test_schedules.py::"
        "test_a_job_whose_message_is_lost_after_a_reconnect_is_sent_again",
    ),
    Mutant(
        "a lost answer to a commit counts as a refusal",
        "app/worker/isolation.py",
        "_OF_DATA: Final = (NotStorable, RequestError)",
        "_OF_DATA: Final = (GristmillError,)",
    ),
    Mutant(
        "giving back at a shutdown is charged",
        "app/worker/ledger.py",
        "charged=False",
        "charged=True",
    ),
    Mutant(
        "a second message is a second job",
        "app/worker/registrar.py",
        " or job_id in known\n",
        "\n",
    ),
    Mutant(
        "a message for a job that was taken away is dropped for good",
        "app/worker/registrar.py",
        "self.give_back(job_id)  # it was taken",
        "pass  # it was taken",
    ),
    Mutant(
        "of a job's messages the first counts, with or without a request",
        "app/worker/registrar.py",
        "if first.arrival.request is None and each.arrival.request is not None:",
        "if False:",
    ),
    Mutant(
        "a revoke that fails takes the arrivals with it",
        "app/worker/registrar.py",
        "        self._cancel_revoked()\n        for refusal in self._refusals:\n",
        "        self._waiting = []\n"
        "        self._cancel_revoked()\n        for refusal in self._refusals:\n",
    ),
    Mutant(
        "full batches of urgent jobs pass over a patient one for long",
        "app/worker/batcher.py",
        "if is_old or num_passed >= STARVATION_BATCHES * limits.max_batch_size:",
        "if is_old:",
        "tests/unit/test_batcher.py",
    ),
    Mutant(
        "a batch passes its size",
        "app/worker/batcher.py",
        "if grown_rows > max_size:",
        "if grown_rows > max_size + 1:",
        "tests/unit/test_batcher.py",
    ),
    Mutant(
        "a job that no engine takes waits before all others",
        "app/worker/batcher.py",
        "if c.num_sequences > most]",
        "if c.num_sequences < 0]",
        "tests/unit/test_batcher.py",
    ),
    Mutant(
        "a suspect that no engine takes waits before all others",
        "app/worker/suspects.py",
        "if job.num_sequences > self._most(job.model, max_rows)]",
        "if job.num_sequences < 0]",
        "tests/unit/test_suspects.py",
    ),
    Mutant(
        "data that one job brought fails its whole group",
        "app/worker/isolation.py",
        "        if len(items) == 1:\n            refuse(items[0], error)\n            return []\n",
        "        for item in items:\n            refuse(item, error)\n        return []\n",
        "tests/unit/test_isolation.py",
    ),
    Mutant(
        "a suspect goes in before what ended is written",
        "app/worker/runner.py",
        "return bool(self._over) and self._dispatcher.has_suspects",
        "return False",
        "tests/simulation/test_ahead.py",
    ),
    Mutant(
        "shares are rounded and do not add up",
        "app/books/shares.py",
        "by_remainder[: total - sum(parts)]",
        "by_remainder[:0]",
        "tests/unit/test_books.py",
    ),
    Mutant(
        "a batch does not count what its members took",
        "app/worker/running.py",
        "            run.batch.device_ns += generation.device_ns\n",
        "",
    ),
    Mutant(
        "what is being written when the queue is counted is let in twice",
        "app/intake/admission.py",
        "inside = _sum(self._counted, _sum(self._let_in, self._entering))",
        "inside = _sum(self._counted, self._let_in)",
        "tests/unit/test_admission.py",
    ),
    Mutant(
        "whoever goes away takes the answer from the others who asked",
        "app/api/reader.py",
        "await asyncio.shield(asked)",
        "await asked",
        "tests/unit/test_api_reader.py",
    ),
    Mutant(
        "a priority is kept as it was sent",
        ARRIVALS,
        'given = int((message.properties or {}).get("priority", 0))',
        'given = (message.properties or {}).get("priority", 0)',
        ANY_MESSAGE,
    ),
    Mutant(
        "a time is kept in the zone and range it was sent in",
        ARRIVALS,
        "return bounded(stamp if stamp.tzinfo else stamp.replace(tzinfo=dt.UTC))",
        "return stamp if stamp.tzinfo else stamp.replace(tzinfo=dt.UTC)",
        ANY_MESSAGE,
    ),
    Mutant(
        "a time limit is made a float before it is bounded",
        ARRIVALS,
        "float(min(hard, MAX_TIME_LIMIT_S))",
        "min(float(hard), MAX_TIME_LIMIT_S)",
        ANY_MESSAGE,
    ),
    Mutant(
        "a task id may be half of a surrogate pair",
        ARRIVALS,
        " and is_unicode(given)",
        "",
        ANY_MESSAGE,
    ),
    Mutant(
        "a message may ask for a priority without end",
        "app/worker/pool/envelope.py",
        "case float(number) if math.isfinite(number):",
        "case float():",
        ANY_MESSAGE,
    ),
    Mutant(
        "a top_p of nothing leaves nothing to draw",
        "app/engines/sampling/draws.py",
        " | (ranks == 0))",
        ")",
        "tests/unit/test_sampling.py",
    ),
    Mutant(
        "a seed of more than 64 bits reaches the device",
        SAMPLING,
        "int64(params.seed)",
        "params.seed",
        "tests/unit/test_sampling.py",
    ),
    Mutant(
        "one time without end fails the read of all rows",
        "app/store/encoding.py",
        "except (Error, ValueError, OverflowError):",
        "except ZeroDivisionError:",
        "tests/integration/test_store_reads.py",
    ),
    Mutant(
        "one row of an unknown state fails the read of all",
        "app/store/reads.py",
        "except (TypeError, ValueError) as error:",
        "except ZeroDivisionError as error:",
        "tests/integration/test_store_reads.py",
    ),
    Mutant(
        "data that the store refuses ends the worker",
        "app/worker/isolation.py",
        "_OF_DATA: Final = (NotStorable, RequestError)",
        "_OF_DATA: Final = (RequestError,)",
    ),
    Mutant(
        "an engine that stands still is waited for",
        "app/worker/engine/host.py",
        "return self._still_ns > self._limit_ns()",
        "return False",
    ),
    Mutant(
        "a request of a later version fails here",
        "app/store/submissions.py",
        " and readable(row.format)",
        "",
    ),
    Mutant(
        "a later version reads no list of those before",
        "app/broker/queues.py",
        "for each in range(1, format + 1)]",
        "for each in [format]]",
    ),
    Mutant(
        "a revoke of what nobody has read leaves no row",
        "app/store/cancellation.py",
        "if submissions.reject(connection, [unread]):",
        "if False:",
    ),
    Mutant(
        "a time limit is its message's alone",
        "app/worker/registrar.py",
        "limit_s = row.time_limit_s",
        "limit_s = None",
    ),
    Mutant(
        "a time limit is not written into the row",
        "app/worker/registrar.py",
        "                time_limit_s=arrival.time_limit_s,\n",
        "",
    ),
    Mutant(
        "messages are counted, not looked for",
        "app/rescue.py",
        "return self._publisher.without_message(late) if late else set()",
        "lengths = self._publisher.queue_lengths(set(late.values()))\n"
        "        return set(late) if sum(lengths.values()) < len(late) else set()",
    ),
    Mutant(
        "two submissions at once pass a tenant's limit together",
        "app/intake/quotas.py",
        "            store.take_turn(connection, tenant)",
        "            pass",
        "tests/integration/test_quotas.py"
        "::test_a_submission_waits_for_what_another_is_about_to_commit",
    ),
    Mutant(
        "a file is deleted while a batch takes it",
        "app/store/files.py",
        'f"{_FIND} FOR SHARE" if hold else _FIND',
        "_FIND",
        "tests/integration/test_openai_files.py::test_a_file_is_not_deleted_while_a_batch_takes_it",
    ),
    Mutant(
        "a batch whose input is lost never ends",
        "app/intake/batches/feed.py",
        "            if outcome is None:\n                raise  # it may",
        "            if True:\n                raise  # it may",
        "tests/integration/test_openai_batches.py"
        "::test_a_batch_whose_input_is_lost_waits_for_it_and_ends_all_the_same",
    ),
    Mutant(
        "all long answers of a batch are read at once",
        "app/store/batch_lines.py",
        "WHERE coalesce(bytes_before, 0) < :page_bytes",
        "WHERE :page_bytes > 0",
        "tests/integration/test_openai_batches.py"
        "::test_long_lines_are_read_and_written_one_at_a_time",
    ),
    Mutant(
        "lines of a batch pass the limits of their tenant",
        "app/intake/batches/feed.py",
        "tenants.enforce(connection, bounded, self._database.now())",
        "pass",
        "tests/integration/test_openai_batches.py"
        "::test_a_batch_keeps_to_the_limits_of_its_tenant_and_goes_on_as_they_give_back",
    ),
    Mutant(
        "what was lost of a tenant is sent again into the list of all",
        "app/rescue.py",
        "        tenant=wake_up.tenant,\n",
        "",
        "tests/integration/test_rescue.py"
        "::test_what_was_lost_of_tenants_is_sent_again_into_their_own_lists",
    ),
    Mutant(
        "tokens of jobs that run count as queued",
        "app/store/quotas.py",
        "FILTER (WHERE state = 'queued')",
        "FILTER (WHERE true)",
        "tests/integration/test_quotas.py"
        "::test_queued_tokens_are_bounded_and_those_of_a_job_that_runs_are_given_back",
    ),
    Mutant(
        "tenants take turns by jobs, and not by what these take",
        LANES,
        "local extra = (spent - ended * mean) / weight",
        "local extra = 0",
        f"{SHARES}::test_tenants_are_served_by_device_time_and_not_by_jobs",
    ),
    Mutant(
        "a tenant's weight counts for nothing",
        LANES,
        "+ jobs * cost(at, tenant) / weight",
        "+ jobs * cost(at, tenant)",
        f"{SHARES}::test_tenants_are_served_by_their_weights",
    ),
    Mutant(
        "who has next to no weight starves",
        LANES,
        "== 0 and at.since or at.tags",
        "== 0 and at.tags or at.tags",
        f"{SHARES}::test_who_has_next_to_no_weight_is_served_now_and_then_all_the_same",
    ),
    Mutant(
        "a tenant that had nothing to do saves up turns",
        LANES,
        "do_('ZADD', at.tags, exact(math.max(v, past)), tenant)",
        "do_('ZADD', at.tags, exact(past), tenant)",
        f"{SHARES}::test_having_waited_for_nothing_saves_up_no_turns",
    ),
    Mutant(
        "a sated worker leaves a newcomer's job where it is",
        "app/broker/transport.py",
        "held[queue] < self._most_with_new(queue)",
        "False",
        f"{SHARES}::test_a_sated_worker_takes_a_newcomers_job_and_nobody_elses",
    ),
    Mutant(
        "in a batch a tenant's tenth job comes before another's first",
        "app/worker/batcher.py",
        "seen[priority, candidate.tenant] += 1",
        "pass",
        "tests/unit/test_batcher.py",
    ),
    Mutant(
        "a flood in the list of all holds up those behind it",
        "app/broker/transport.py",
        "if is_read and self._is_sated(queue) and not self._keeps_all:",
        "if False:",
    ),
    Mutant(
        "a long queue takes the room of a short one",
        "app/broker/transport.py",
        "return [queue for queue in super().consume(n) if not self._channel._is_sated(queue)]",
        "return sorted(super().consume(n), reverse=True)",
    ),
    Mutant(
        "a queue that has room again is not looked at while another is waited for",
        "app/broker/transport.py",
        "self._long |= self.missed",
        "pass",
        "tests/integration/test_broker_budgets.py",
    ),
    Mutant(
        "a queue that has room again is looked at when the hub's wait is over anyway",
        "app/broker/transport.py",
        "self.end_wait()  # that was",
        "pass  # that was",
        "tests/unit/test_transport.py",
    ),
    Mutant(
        "an end is held by the time that it ran, however long it waited here",
        "app/worker/engine/ends.py",
        "arrived_ns.get(each.sequence_id) or each.started_ns",
        "each.started_ns",
        ENDS,
    ),
    Mutant(
        "who waits for a connection is overtaken",
        "app/store/turns.py",
        "            if self._line:\n",
        "            if False:\n",
        "tests/unit/test_store_turns.py",
    ),
    Mutant(
        "urgent messages keep patient ones waiting for ever",
        FETCHING,
        "local most, patient, early = tonumber(ARGV[3]), tonumber(ARGV[5]), 0",
        "local most, patient, early = tonumber(ARGV[3]), 0, 0",
        FETCHES,
    ),
    Mutant(
        "what jobs used is lost with the connection",
        "app/broker/transport.py",
        "        finally:\n            self.tally.keep(used)\n",
        "",
        FETCHES,
    ),
    Mutant(
        "what is fetched is noted nowhere",
        FETCHING,
        "if #item < 64000000 then",
        "if false then",
        FETCHES,
    ),
    Mutant(
        "a lost answer takes what was fetched with it",
        "app/broker/transport.py",
        "self.qos.expect(self._fetcher.tags(most))",
        "pass",
        FETCHES,
    ),
    Mutant(
        "a message is acknowledged with the first of its jobs",
        "app/broker/settling.py",
        "        if self._left:\n",
        "        if False:\n",
        SETTLING,
    ),
    Mutant(
        "a message of which a job is to come again is taken off",
        "app/broker/settling.py",
        "self._comes_again = self._comes_again or requeue",
        "self._comes_again = False",
        SETTLING,
    ),
    Mutant(
        "the last job of a message is lost",
        ARRIVALS,
        "for task_id in self.more\n",
        "for task_id in self.more[:-1]\n",
        "tests/unit/test_arrivals.py",
    ),
    Mutant(
        "a job is in two messages",
        "app/broker/publisher.py",
        "group[start : start + size]",
        "group[start : start + size + 1]",
        "tests/integration/test_broker.py",
    ),
    Mutant(
        "rescue does not see the further jobs of a message",
        "app/broker/waiting.py",
        "for place = 0, #more do",
        "for place = 0, 0 do",
        "tests/integration/test_broker.py",
    ),
    Mutant(
        "a message of many jobs counts as one",
        "app/broker/message.py",
        "return 1 + len(more) if isinstance(more, list) else 1",
        "return 1",
        FETCHES,
    ),
    Mutant(
        "an end that rescue wrote is told as the worker's own",
        STORE,
        "\n            AND outcome IN ('succeeded', 'failed')",
        "",
        CLAIMS,
    ),
    Mutant(
        "a worker goes in circles while a batch has no room",
        "app/worker/runner.py",
        " and closes_ns > self.turned_ns",
        "",
    ),
    Mutant(
        "a lone job waits for company that can join later",
        "app/worker/batcher.py",
        "suits_ns = GATHER_NS if capacity.joins else STATIC_WAIT_NS",
        "suits_ns = STATIC_WAIT_NS",
        "tests/unit/test_batcher.py",
    ),
    Mutant(
        "what a longer batch takes does not count as a wait",
        "app/worker/policy.py",
        "max_wait_ns - cost.row_ns * (rows - 1)",
        "max_wait_ns",
        "tests/unit/test_policy.py",
    ),
    Mutant(
        "a batch waits past a deadline less its run",
        "app/worker/policy.py",
        "default=math.inf) - cost.of(rows)",
        "default=math.inf)",
        "tests/unit/test_policy.py",
    ),
    Mutant(
        "the rate does not fall while nobody comes",
        "app/worker/policy.py",
        "return min(silent, first_ns",
        "return max(silent, first_ns",
        "tests/unit/test_policy.py",
    ),
    Mutant(
        "what batches took is never told to the policy",
        "app/worker/executor.py",
        "self._dispatcher.note_batch(batch)",
        "pass",
        AHEAD,
    ),
    Mutant(
        "what is recommended may be slower than it is to be",
        "app/tune/frontier.py",
        "for point in points if point.p95_ms <= p95_ms]",
        "for point in points]",
        "tests/unit/test_tune.py",
    ),
    Mutant(
        "a size is recommended that refuses jobs of the trace",
        "app/cli/tune.py",
        "for size in some if size in (most, max(size, least)))",
        "for size in some)",
        "tests/unit/test_tune.py",
    ),
    Mutant(
        "the next batch closes before it is full",
        "app/worker/batcher.py",
        "if capacity.is_ahead or now_ns <",
        "if now_ns <",
        "tests/unit/test_batcher.py",
    ),
    Mutant(
        "the next batch is claimed when the one before is over",
        "app/worker/dispatcher.py",
        "        return capacities | ahead\n",
        "        return capacities\n",
        AHEAD,
    ),
    Mutant(
        "a claimed batch waits in the worker for the one before",
        "app/worker/dispatcher.py",
        "if members := self._take_fitting(model, capacity):",
        "if not capacity.is_ahead and (members := self._take_fitting(model, capacity)):",
        AHEAD,
    ),
    Mutant(
        "no more is claimed than an engine that is joined has room for",
        "app/worker/dispatcher.py",
        "return replace(room, rows=room.rows + ahead)",
        "return room",
        AHEAD,
    ),
    Mutant(
        "a batch of which a part waits for room has run",
        "app/worker/dispatcher.py",
        "if any(job.claimed_run.batch is batch for job in self._claimed.get(batch.model, ())):",
        "if False:",
        AHEAD,
    ),
    Mutant(
        "ends are written as often as if the engine were not full",
        "app/worker/runner.py",
        "is_full = self._executor.is_busy and self._dispatcher.has_claimed",
        "is_full = False",
        AHEAD,
    ),
    Mutant(
        "each end is told, and committed, by itself",
        "app/worker/engine/ends.py",
        "(ended.finished_ns - since_ns) // PART)",
        "0)",
        ENDS,
    ),
    Mutant(
        "an end waits for others where nobody is left",
        "app/worker/engine/ends.py",
        "not self._joins or not num_inside or has_enough",
        "not self._joins or has_enough",
        ENDS,
    ),
    Mutant(
        "ends that were not told keep a full engine's rows from others",
        "app/worker/engine/ends.py",
        "is_full and len(self._held) > self._max_rows // ROWS",
        "False",
        ENDS,
    ),
    Mutant(
        "ends are told only when the youngest of them is due",
        "app/worker/engine/ends.py",
        "min(self._due_ns, due_ns) if self._held else due_ns",
        "due_ns",
        ENDS,
    ),
    Mutant(
        "ends of one model wait for a whole batch of another",
        "app/worker/engine/process.py",
        "for other in self._ends.keys() - {model}:",
        "for other in ():",
        "tests/unit/test_engine_process.py",
    ),
    Mutant(
        "what ended before memory ran out is told after it, as if it had been dropped",
        "app/worker/engine/process.py",
        "            self._tell_ends(model)\n            dropped",
        "            dropped",
        "tests/unit/test_engine_process.py",
    ),
    Mutant(
        "a job fails by its time limit because its end was told after it",
        "app/worker/executor.py",
        "job.claimed_run, ending in LIMITS and job.ended_in_time",
        "job.claimed_run, False",
        AHEAD,
    ),
    Mutant(
        "a job fails by a limit that passed while its end was not told",
        "app/worker/executor.py",
        "if job.claimed_run.ending in LIMITS and job.ended_in_time:",
        "if False:",
        AHEAD,
    ),
    Mutant(
        "an end waits as long as if the engine were full",
        "app/worker/runner.py",
        "is_full = self._executor.is_busy and self._dispatcher.has_claimed",
        "is_full = self._executor.is_busy",
        AHEAD,
    ),
    Mutant(
        "what depends on values is planned as look-ups are",
        "app/store/database.py",
        "self._transactions[looks_up or self._looks_up_only]",
        "self._transactions[True]",
        "tests/integration/test_store_database.py::"
        "test_look_ups_are_planned_once_and_other_statements_of_the_same_connection_each_time",
    ),
    Mutant(
        "one claimed batch after the other waits for the engine",
        "app/worker/dispatcher.py",
        " and not room.has_waiting",
        "",
        AHEAD,
    ),
    Mutant(
        "claimed jobs wait for a long batch, whoever is more urgent",
        "app/worker/dispatcher.py",
        "is_soon = self._lasted_ns.get(model, SOON_NS) < SOON_NS",
        "is_soon = True",
        AHEAD,
    ),
    Mutant(
        "a claimed batch goes in whole, whatever memory there is",
        "app/worker/dispatcher.py",
        "members, _ = fill(candidates, most, limits.max_batch_tokens, capacity)",
        "members = candidates",
        AHEAD,
    ),
    Mutant(
        "a claimed job that is cancelled waits for its turn",
        "app/worker/executor.py",
        "if self._running.is_waiting(job):",
        "if False:",
        AHEAD,
    ),
    Mutant(
        "a worker that drains keeps what it has claimed and does not run",
        "app/worker/executor.py",
        "if self._host.ready and self._host.has_waiting(model):",
        "if False:",
        AHEAD,
    ),
    Mutant(
        "a time limit counts from the claim",
        "app/worker/work.py",
        "began_ns = self.run.began_ns if self.run else None",
        "began_ns = self.run.claimed_ns if self.run else None",
        AHEAD,
    ),
    Mutant(
        "a claimed batch is a suspect of the one before",
        "app/worker/executor.py",
        "        self._dispatcher.add_claimed(self._running.leave_waiting())\n",
        "",
        AHEAD,
    ),
    Mutant(
        "a message says itself where it came from",
        "app/worker/pool/envelope.py",
        '"routing_key": str(route)} if is_unicode(exchange + route):',
        '"routing_key": str(route)} if route:\n            pass\n        case _ if True:',
        ODD_MESSAGES,
    ),
    Mutant(
        "any delivery tag will do",
        "app/worker/pool/envelope.py",
        "case str(tag) if tag and is_unicode(tag):",
        "case _ if True:",
        "tests/unit/test_envelope.py",
    ),
    Mutant(
        "properties may be anything",
        "app/worker/pool/envelope.py",
        "if not isinstance(given, dict | None):\n"
        '        raise RequestError("properties must be an object.", param="properties")',
        "if False:\n"
        '        raise RequestError("properties must be an object.", param="properties")',
        ODD_MESSAGES,
    ),
    Mutant(
        "a body that is no base64 reaches kombu",
        "app/worker/pool/envelope.py",
        "base64.b64decode(body)",
        "pass",
        ODD_MESSAGES,
    ),
    Mutant(
        "a timeline counts time that a clock took back",
        "app/books/timeline.py",
        "at = min(max(stamp, begin), end)",
        "at = stamp",
        "tests/unit/test_timeline.py",
    ),
    Mutant(
        "a timeline names jobs of other tenants",
        "app/store/surroundings.py",
        "mate.tenant = :tenant AND ",
        ":tenant <> '' AND ",
        "tests/integration/test_explain.py",
    ),
    Mutant(
        "a timeline's job is in a worker that let go of it",
        "app/store/delivery.py",
        "worker_id = NULL, received_at = NULL,\n        enqueued_at",
        "worker_id = NULL,\n        enqueued_at",
        "tests/integration/test_explain.py",
    ),
    Mutant(
        "two threads write a piece that both have computed",
        CREW,
        "return taken = seen < writing &&",
        "return taken = seen < writing + 9 ||",
        CREWS,
    ),
    Mutant(
        "a thread goes on before others have written what it reads",
        CREW,
        "if (!is_written(part, at)) wait_for(part, at, piece);",
        "if (!is_written(part, at)) break;",
        CREWS,
    ),
    Mutant(
        "a timeline takes what is computed again for the prompt's",
        "app/engines/inflight/engine.py",
        "new = min(end, max(segment.start, row.furthest))",
        "new = segment.start",
        "tests/unit/test_inflight_engine.py",
    ),
    Mutant(
        "half a nano-unit is left out of a cost",
        "app/books/cost.py",
        "(2 * numerator + denominator) // (2 * denominator)",
        "numerator // denominator",
        BOOKS,
    ),
    Mutant(
        "cached tokens cost what others do",
        "app/books/cost.py",
        "price.per_million_input_tokens if cached_price is None else cached_price",
        "price.per_million_input_tokens",
        BOOKS,
    ),
    Mutant(
        "a price that was edited is taken",
        "app/store/prices.py",
        "if getattr(row, name) != getattr(given[row.id], name)",
        "if getattr(row, name) != getattr(row, name)",
        "tests/integration/test_store_prices.py",
    ),
    Mutant(
        "two prices of a device at a time are taken",
        "app/config/prices.py",
        "if began == begins or (until and begins and until > begins):",
        "if began == begins and until:",
        "tests/unit/test_config_file.py",
    ),
    Mutant(
        "a window is closed while a commit's fate is unknown",
        ACCOUNT,
        "            if self._in_doubt:\n                return\n",
        "",
        ACCOUNTS,
    ),
    Mutant(
        "what is committed a second time is booked a second time",
        ACCOUNT,
        "for id_, each in spent.items() if id_ in self._unsettled",
        "for id_, each in spent.items()",
        ACCOUNTS,
    ),
    Mutant(
        "waste is booked as billed",
        ACCOUNT,
        "self._busy += busy\n        self._waste += waste + stray",
        "self._busy += busy + waste\n        self._waste += stray",
        ACCOUNTS,
    ),
    Mutant(
        "what is open is forgotten from window to window",
        ACCOUNT,
        "self._before, self._joules, self._open = totals, joules, open_",
        "self._before, self._joules, self._open = totals, joules, Spent()",
        ACCOUNTS,
    ),
    Mutant(
        "rounding leaves out what is open",
        ACCOUNT,
        "self._waste.ns, time_ns.overhead, open_.ns)",
        "self._waste.ns, time_ns.overhead)",
        ACCOUNTS,
    ),
    Mutant(
        "a window is the next one's number",
        ACCOUNT,
        "            number=self._number,",
        "            number=self._number + 1,",
        ACCOUNTS,
    ),
    Mutant(
        "what is given back is in no window",
        RELEASES,
        "energy_method = next.energy_method,\n            window_number = next.window_number",
        "energy_method = next.energy_method",
        "tests/integration/test_store_contract.py",
    ),
    Mutant(
        "the audit does not see what is billed too much",
        "app/store/audit.py",
        "SELECT {_WINDOW}, busy_ns - settled_ns FROM told",
        "SELECT {_WINDOW}, greatest(0, busy_ns - settled_ns) FROM told",
        AUDIT,
    ),
    Mutant(
        "the audit does not see a nano-unit",
        "app/store/audit.py",
        "- 1000000000 * rounding FROM",
        "- 1000000000 * rounding - 1 FROM",
        AUDIT,
    ),
    Mutant(
        "an hour's usage forgets what it had",
        "app/store/usage.py",
        "{name} = kept.{name} + excluded.{name}",
        "{name} = excluded.{name}",
        USAGE,
    ),
    Mutant(
        "usage is told without what rescue has not added yet",
        "app/store/usage.py",
        'else f"usage WHERE hour >= :since',
        'else f"usage_hours WHERE hour >= :since',
        USAGE,
    ),
    Mutant(
        "a batch's totals are summed as if they were increments",
        "migrations/versions/0003_jobs.py",
        "SELECT 1 AS way, * FROM written UNION ALL SELECT -1, * FROM before",
        "SELECT 1 AS way, * FROM written",
        USAGE,
    ),
    Mutant(
        "jobs without a currency swallow those that ran without a price",
        "app/books/usage.py",
        " and not (never_ran[0].tokens or never_ran[0].device_ns):",
        ":",
        "tests/unit/test_usage.py",
    ),
    Mutant(
        "idling is not spread over the jobs",
        "app/books/usage.py",
        "device_cost(device.up_ns, device.price)",
        "device_cost(device.busy_ns, device.price)",
        "tests/unit/test_usage.py",
    ),
    Mutant(
        "what was taken ahead of a counter is not paid back",
        "app/books/energy.py",
        "return Taken(max(0, rise_nj - ahead_nj), EnergyMethod.MEASURED)",
        "return Taken(rise_nj, EnergyMethod.MEASURED)",
        ENERGY,
    ),
    Mutant(
        "a counter that began anew is taken at its word",
        "app/books/energy.py",
        "return rise_nj if 0 <= rise_nj <= MOST_WATTS * (since_ns + SECOND_NS) else None",
        "return abs(rise_nj)",
        ENERGY,
    ),
    Mutant(
        "what an attempt pays for its energy is left to the others as well",
        "app/books/energy.py",
        "        self.nj -= total_nj\n",
        "",
        ENERGY,
    ),
    Mutant(
        "the energy of an attempt is paid each time that its record is made",
        "app/worker/settlement.py",
        "run.paid = run.paid or self._energy.pay(",
        "run.paid = self._energy.pay(",
    ),
    Mutant(
        "the energy of what is given back is nobody's",
        "app/worker/ledger.py",
        "wasted_nj=paid.spent_nj,",
        "wasted_nj=0,",
    ),
    Mutant(
        "the energy of a late zombie is not noted",
        STORE,
        "ELSE greatest(attempts.wasted_nj, given.energy_nj + given.wasted_nj) END",
        "ELSE attempts.wasted_nj END",
        CLAIMS,
    ),
    Mutant(
        "the energy of a step that runs is taken for that of the idle time before it",
        "app/worker/energy/meter.py",
        "running_ns = look.open_ns if self._gauges else 0",
        "running_ns = 0",
        "tests/unit/test_energy_meter.py",
    ),
    Mutant(
        "two lines of a batch have one place",
        "app/batches.py",
        "place = getattr(now, file) + 1",
        "place = getattr(self, file) + 1",
        BATCHES,
    ),
    Mutant(
        "a batch that expired is told as completed",
        "app/batches.py",
        "return BatchState.EXPIRED if counts.expired else BatchState.COMPLETED",
        "return BatchState.COMPLETED",
        BATCHES,
    ),
    Mutant(
        "a line of a batch is read again by the next page",
        "app/intake/batches/input_file.py",
        "end = at - len(piece) + done",
        "end = at - len(piece)",
        "tests/unit/test_batch_lines.py",
    ),
    Mutant(
        "answers of a file are taken for those of another one",
        "app/cli/batch_lines.py",
        "if self.ended and not self.run.is_of(file):",
        "if False:",
        "tests/unit/test_cli_batch.py::test_answers_are_never_taken_for_those_of_other_lines",
    ),
    Mutant(
        "an event that broke off after its id counts as had",
        "clients/python/gristmill_client/events.py",
        "                self._id = value\n",
        "                self._id = self.last_id = value\n",
        "tests/unit/test_client_events.py"
        "::test_an_event_that_broke_off_after_its_id_is_asked_for_again",
    ),
    Mutant(
        "a custom id may come twice in a batch",
        "app/intake/batches/scan.py",
        "if digest in self._seen:",
        "if False:",
        "tests/unit/test_batch_lines.py",
    ),
    Mutant(
        "a call that is waited for waits behind what waits already",
        "app/broker/transport.py",
        "        if is_live:\n",
        "        if False:\n",
        "tests/integration/test_broker.py::test_what_is_waited_for_is_taken_before_all_that_waits",
    ),
    Mutant(
        "what may be a call is told as if it were none",
        "app/requests/saying.py",
        "openers = self._form.openers if self._form is not None else ()",
        "openers = ()",
        "tests/unit/test_saying.py::test_text_is_told_as_soon_as_it_is_certain",
    ),
    Mutant(
        "a thought whose end mark comes where a call may be is what was said",
        "app/requests/saying.py",
        "case _ if self._may_think and self._end in self._buffer:",
        'case "content" if self._may_think and self._end in self._buffer:',
        "tests/unit/test_saying.py::test_what_is_told_and_the_rest_are_the_answer",
    ),
    Mutant(
        "an answer that is begun anew goes on whatever was told before",
        "app/requests/saying.py",
        "if new[:known] != self._expected[:known]:",
        "if False:",
        "tests/unit/test_saying.py"
        "::test_an_answer_that_is_begun_anew_and_another_is_not_gone_on_with",
    ),
    Mutant(
        "an answer that is begun anew is told twice",
        "app/requests/saying.py",
        "self._expected = self.text",
        'self._expected = ""',
        "tests/unit/test_openai_chunks.py::test_an_answer_that_is_begun_anew_is_told_once",
    ),
    Mutant(
        "who leaves a stream leaves its job to the device",
        "app/api/live/streams.py",
        "if not self._is_over:  # the caller has gone, or is told no more",
        "if False:",
        "tests/integration/test_openai_calls.py::test_who_leaves_a_stream_takes_the_job_along",
    ),
    Mutant(
        "clients try again what workers have tried again",
        "app/api/problems.py",
        "_TRIED: Final = (errors.EngineError, errors.AttemptsExhausted)",
        "_TRIED: Final = ()",
        "tests/unit/test_api_problems.py"
        "::test_what_workers_have_tried_again_is_not_to_be_tried_again_by_clients",
    ),
    Mutant(
        "keys: any secret fits a known id",
        "app/store/keys.py",
        "row is None or not hmac.compare_digest(bytes(row.digest), digest)",
        "row is None",
        "tests/integration/test_keys.py",
    ),
    Mutant(
        "keys: what was looked up counts for ever",
        "app/api/keyring.py",
        "if answer and self._clock() < answer.fresh_until_s else None",
        "if answer else None",
        "tests/unit/test_keys.py",
    ),
    Mutant(
        "keys: an API that was closed opens again",
        "app/api/keyring.py",
        "self._is_open = not await self._any_made()",
        "await self._any_made()",
        "tests/unit/test_keys.py",
    ),
    Mutant(
        "tenants: rows are not closed to who owns the tables",
        "app/store/tenancy.py",
        'for what in ("ENABLE", "FORCE")',
        'for what in ("ENABLE",)',
        "tests/integration/test_row_security.py",
    ),
    Mutant(
        "tenants: what runs as the owner shows whatever it is asked for",
        "migrations/versions/0003_jobs.py",
        "current_setting('gristmill.tenant', true) IN (of_tenant, '*')",
        "true",
        "tests/integration/test_row_security.py",
    ),
    Mutant(
        "tenants: any message names its tenant",
        ARRIVALS,
        'is_tenant(named) and (named in trusted or "*" in trusted)',
        "is_tenant(named)",
        "tests/unit/test_arrivals.py",
    ),
)


def mutate(root: Path, mutant: Mutant) -> str:
    """Plant the defect; returns the text of the file as it was."""
    file = root / mutant.file
    text = file.read_text()
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.defect}: its words occur {found} times in {mutant.file}.")
    file.write_text(text.replace(mutant.old, mutant.new))
    return text


def copy_tree(to: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)


def failed_test(root: Path, tests: list[str]) -> str | None:
    """The first of these tests that fails in this tree; None if all pass."""
    paths = [str(root), str(root / "clients" / "python")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", *tests],
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return None
    caught = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or caught is None:
        raise RuntimeError(f"pytest did not run {tests}:\n{done.stdout}{done.stderr}")
    return caught[1].rpartition("::")[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only defects with one of these in their name")
    words = parser.parse_args().words
    chosen = [each for each in MUTANTS if not words or any(w in each.defect for w in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_tree(root)
        if test := failed_test(root, list(dict.fromkeys(each.tests for each in chosen))):
            print(f"{test} fails without any defect.")  # noqa: T201
            return 2
        for mutant in chosen:
            began = time.monotonic()
            text = mutate(root, mutant)
            caught = failed_test(root, [mutant.tests])
            (root / mutant.file).write_text(text)
            survivors += caught is None
            took_s = time.monotonic() - began
            print(  # noqa: T201
                f"{mutant.defect:62} {took_s:5.1f} s  {caught or 'SURVIVES'}", flush=True
            )
    print(f"{len(chosen) - survivors} of {len(chosen)} defects are caught.")  # noqa: T201
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
