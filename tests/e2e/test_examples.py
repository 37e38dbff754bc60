"""The examples of the README and of docs/ run, as they stand there.

They run against everything that `gristmill up` starts, with the shipped configuration but for the
engines, which are stubs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
import redis
from psycopg.rows import dict_row

from app.config.file import load
from app.local.servers import EmbeddedPostgres
from app.local.supervisor import System
from tests.pages import EXAMPLES, ROOT
from tests.signals import HEEDING_SIGNALS
from tests.sse import read_events, text_of
from tests.waiting import eventually

API = "http://127.0.0.1:8000"  # in the examples; the tests' own port takes its place
NO_PACKAGE = "\nimport sys\nassert not {'app', 'gristmill_client'} & sys.modules.keys()\n"


# ── everything runs once, for all examples ──────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def system(
    tmp_path_factory: pytest.TempPathFactory,
    postgres_server: EmbeddedPostgres,
    empty_databases: Callable[[str], str],
    migrated_template: str,
) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("examples")
    for name in ("models.toml", "prices.toml"):
        (folder / name).write_text((ROOT / "configs" / name).read_text())
    shipped = load(ROOT / "configs" / "default.toml", {}).settings
    lines = [
        f'cache_dir = "{folder / "cache"}"',
        f'database.url = "{empty_databases(migrated_template)}"',
        "api.port = 0",
        "flower.port = 0",
        *(f'models."{name}".engine = "stub"' for name in shipped.models),
    ]
    (folder / "settings.toml").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("GRISTMILL_")]:
            patch.delenv(name)
        patch.setenv("OMP_NUM_THREADS", "1")
        with System(load(folder / "settings.toml"), tell=lambda _: None) as system:
            yield system


class Terminal:
    """A user's shell and Python in another terminal, with the environment that the README sets."""

    def __init__(self, system: System, folder: Path) -> None:
        self._api_url = system.settings.api.url
        self._folder = folder
        cache_dir = Path(system.settings.cache_dir)
        self.environ = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GRISTMILL_CONFIG": str(cache_dir.with_name("settings.toml")),
        }

    def export(self, name: str) -> None:
        """Run an example of `export` lines and keep what they set."""
        code = EXAMPLES[name][1]
        names = re.findall(r"^export (\w+)=", code, re.MULTILINE)
        values = self._run(["bash", "-euc", code + "".join(f"echo ${each}\n" for each in names)])
        self.environ |= dict(zip(names, values.splitlines(), strict=True))

    def run(self, name: str, *, then: str = "", **environ: str) -> str:
        """Run an example as it stands on its page; returns what it prints."""
        language, code = EXAMPLES[name]
        shell = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
        return self._run([*shell[language], code.replace(API, self._api_url) + then], **environ)

    def write(self, name: str, text: str) -> Path:
        file = self._folder / name
        file.write_text(text)
        return file

    @contextmanager
    def started(self, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        """A program in a terminal of its own: what is sent to its group is as Ctrl-C there."""
        with subprocess.Popen(
            [*HEEDING_SIGNALS, *command],
            cwd=self._folder,
            env=self.environ,
            start_new_session=True,
        ) as running:
            try:
                yield running
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL)

    def check(self, command: list[str]) -> str:
        return self._run(command)

    def _run(self, command: list[str], **environ: str) -> str:
        done = subprocess.run(
            command,
            cwd=self._folder,
            env=self.environ | environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def terminal(system: System, tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    terminal = Terminal(system, tmp_path_factory.mktemp("terminal"))
    terminal.export("environment")
    return terminal


@pytest.fixture
def ended(system: System) -> Callable[[str], dict[str, Any]]:
    """`ended(job_id)` waits for a job's end through the API."""

    def wait(job_id: str) -> dict[str, Any]:
        url = f"{system.settings.api.url}/v1/jobs/{job_id}"
        eventually(lambda: httpx.get(url).is_success)  # a bare message gets its row when received
        answer = httpx.get(url, params={"wait": 20}, timeout=30)
        job: dict[str, Any] = answer.raise_for_status().json()
        return job

    return wait


@pytest.fixture
def run_sql(system: System) -> Callable[[str], list[dict[str, Any]]]:
    def run(statement: str) -> list[dict[str, Any]]:
        url = system.settings.database.url
        with psycopg.connect(url, row_factory=dict_row) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    return run


Ended = Callable[[str], dict[str, Any]]
Query = Callable[[str], list[dict[str, Any]]]


# ── enqueue ─────────────────────────────────────────────────────────────────────────────────────


def test_the_first_job_of_the_command_line_is_answered(terminal: Terminal) -> None:
    assert "completed" in terminal.run("first job")


def test_the_addresses_are_those_of_the_running_system(terminal: Terminal, system: System) -> None:
    assert terminal.environ["REDIS_URL"] == system.settings.broker.url
    assert terminal.environ["DATABASE_URL"] == system.settings.database.url


def test_a_services_own_celery_app_needs_nothing_of_this_package(
    terminal: Terminal, ended: Ended
) -> None:
    job = ended(terminal.run("celery", then=NO_PACKAGE).strip())

    assert job["state"] == "completed"
    assert job["response"]["choices"][0]["text"] == "A grist mill is"


def test_celerys_options_reach_the_job(terminal: Terminal, ended: Ended) -> None:
    job = ended(terminal.run("celery options", then=NO_PACKAGE).strip())

    assert (job["state"], job["kind"], job["priority"]) == ("completed", "embed", 3)
    assert job["created_at"] < job["not_before"] <= job["claimed_at"] < job["deadline"]


def test_curl_submits_a_chat(terminal: Terminal, ended: Ended) -> None:
    job = ended(httpx.Response(200, text=terminal.run("http short")).json()["id"])

    assert job["response"]["choices"][0]["message"]["role"] == "assistant"


def test_curl_submits_one_job_and_its_key_brings_it_back(terminal: Terminal, ended: Ended) -> None:
    first, again = (httpx.Response(200, text=terminal.run("http")).json() for _ in range(2))

    job = ended(first["id"])
    assert job["state"] == "completed"
    assert job["metadata"] == {"customer": "42"}
    assert again["id"] == first["id"]


def test_curl_submits_many_jobs_with_an_answer_for_each(terminal: Terminal, ended: Ended) -> None:
    bulk = httpx.Response(200, text=terminal.run("http bulk")).json()

    assert [item["status"] for item in bulk["items"]] == [202, 202, 400]
    jobs = [ended(item["id"]) for item in bulk["items"][:2]]
    assert [job["state"] for job in jobs] == ["completed", "completed"]
    assert len(jobs[1]["response"]["data"]) == 2
    assert bulk["items"][2]["error"]["param"] == "body.prompt"


def test_curl_submits_a_job_whose_output_is_held_to_a_schema(
    terminal: Terminal, ended: Ended
) -> None:
    job = ended(httpx.Response(200, text=terminal.run("schema")).json()["id"])

    assert job["state"] == "completed"


def test_the_client_answers_in_three_lines(terminal: Terminal) -> None:
    assert terminal.run("client short") == "A grist mill is\n"


def test_openais_client_is_answered(terminal: Terminal) -> None:
    # the stub says what it is asked
    assert "What is a grist mill?" in terminal.run("openai chat")
    assert "What is a grist mill?" in terminal.run("openai stream")


def test_openais_client_reads_chats_that_it_stored(terminal: Terminal) -> None:
    told = terminal.run("openai stored chats")

    assert told.startswith("chatcmpl-") and "'reviewed': 'yes'" in told


def test_openais_client_is_answered_in_the_background(terminal: Terminal) -> None:
    assert "What is a grist mill?" in terminal.run("openai background")


def test_a_file_of_requests_is_answered_with_a_file(terminal: Terminal) -> None:
    terminal.run("batch file")

    answers = list(map(json.loads, terminal.run("openai batch").strip().splitlines()))

    told = {each["custom_id"]: each["response"]["body"]["choices"][0]["text"] for each in answers}
    assert told == {"1": "A mill", "2": "A stone"}


def test_anthropics_client_is_answered(terminal: Terminal) -> None:
    assert "What is a grist mill?" in terminal.run("anthropic message")

    assert "What is a grist mill?" in terminal.run("anthropic short")

    told = sorted(terminal.run("anthropic batch").splitlines())
    assert told == [f"mill-{n} succeeded" for n in range(3)]


def test_the_client_submits_waits_and_cancels(terminal: Terminal) -> None:
    assert terminal.run("client").splitlines() == [
        "A grist mill is",
        "completed completed",
        "cancelled",
    ]


def test_the_async_client_gathers_answers(terminal: Terminal) -> None:
    assert terminal.run("async client").splitlines() == ["0 mills", "1 mills", "2 mills"]


def test_the_client_hands_out_answers_as_jobs_end(terminal: Terminal) -> None:
    assert sorted(terminal.run("client stream").splitlines()) == [
        "0 0 mills",
        "1 1 mills",
        "2 2 mills",
    ]


def test_the_client_and_the_command_show_an_answer_as_it_comes(terminal: Terminal) -> None:
    assert terminal.run("client events") == "A grist mill is"

    answer, *record = terminal.run("stream").splitlines()
    assert "Name three uses of a grist mill." in answer
    assert "state\tcompleted" in record


def test_the_client_runs_many_and_hands_out_each_as_it_ends(terminal: Terminal) -> None:
    assert sorted(terminal.run("client run").splitlines()) == [
        "0 0 mills",
        "1 1 mills",
        "2 2 mills",
    ]


def test_a_batch_is_answered_in_a_file(terminal: Terminal) -> None:
    answers = [json.loads(line) for line in terminal.run("command batch").splitlines()]
    assert {
        each["custom_id"]: each["response"]["body"]["choices"][0]["text"] for each in answers
    } == {
        "1": "1 mills",
        "2": "2 mills",
        "3": "3 mills",
    }

    shown = terminal.run("batch short", then="cat answers.jsonl")
    assert "One mills" in shown and "Three mills" in shown


def test_a_batch_that_is_interrupted_goes_on_and_runs_no_line_twice(
    terminal: Terminal, run_sql: Query
) -> None:
    # given a file of more than two pages, one of whose lines is broken and one takes its time
    prompts = [f"grain {n} {uuid4()}" for n in range(1_200)]
    lines = [json.dumps({"prompt": prompt, "max_tokens": 100}) for prompt in prompts]
    lines[3] = "nonsense"
    lines[5] = json.dumps({"prompt": "sleep 5000", "max_tokens": 100})
    file = terminal.write("prompts.jsonl", "\n".join(lines))
    out = file.with_name("out.jsonl")
    command = ["gristmill", "batch", "run", str(file), "-o", str(out)]

    # when it is interrupted after the first answers, killed after more, and then runs to its end
    for sent, least in ((signal.SIGINT, 1), (signal.SIGKILL, 500)):
        with terminal.started(command) as running:
            eventually(lambda: out.exists() and out.read_bytes().count(b"\n") > least)  # noqa: B023
            os.killpg(running.pid, sent)
            assert running.wait(30) != 0
    run, *_ = out.with_name("out.jsonl.run").read_text().split()
    with terminal.started(command) as running:
        assert running.wait(60) == 5  # one line has no answer

    # then each line has one answer, its own, and each job was made once
    answers = {each["custom_id"]: each for each in map(json.loads, out.read_text().splitlines())}
    assert len(answers) == out.read_text().count("\n") == 1_200
    assert answers.pop("line-4")["error"]["code"] == "invalid_request"
    for custom_id, answer in answers.items():
        text = answer["response"]["body"]["choices"][0]["text"]
        assert custom_id == "line-6" or text == prompts[int(custom_id[5:]) - 1]
    [row] = run_sql(f"SELECT count(*) FROM jobs WHERE idempotency_key LIKE '{run}-%'")
    assert row["count"] == 1_199


def test_the_command_answers_a_pipe_line_by_line(terminal: Terminal) -> None:
    rows = [line.split("\t") for line in terminal.run("command pipe").splitlines()]

    assert [(line, state, answer) for line, _, state, answer in rows] == [
        ("1", "completed", '"wheel"'),
        ("2", "completed", '"stone"'),
        ("3", "completed", '"race"'),
    ]


def test_the_command_chooses_jobs_by_their_metadata(terminal: Terminal) -> None:
    text, shown = terminal.run("command choose").splitlines()

    assert text == "A grist mill is"
    assert shown.split("\t")[1:3] == ["completed", "smollm2-135m-instruct"]


def test_a_raw_message_needs_nothing_but_a_redis_client(terminal: Terminal, ended: Ended) -> None:
    job = ended(terminal.run("raw redis", then=f"print(job_id){NO_PACKAGE}").strip())

    assert job["response"]["choices"][0]["text"] == "A grist mill is"


def test_the_raw_message_is_right_byte_for_byte(system: System, ended: Ended) -> None:
    message = EXAMPLES["raw bytes"][1].strip()
    with redis.Redis.from_url(system.settings.broker.url) as client:
        client.lpush("celery", message)

    job = ended("0d2f3610-0f40-40d9-92f0-a894c179637c")

    assert (job["state"], job["usage"]["input_tokens"]) == ("completed", 15)


# ── follow, and read ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def job_id(system: System) -> str:
    """A job that was just submitted."""
    body = {"body": {"prompt": "A grist mill is"}}
    answer = httpx.post(f"{system.settings.api.url}/v1/jobs", json=body)
    return str(answer.raise_for_status().json()["id"])


def test_a_job_is_followed_with_curl(terminal: Terminal, job_id: str) -> None:
    job = httpx.Response(200, text=terminal.run("follow", ID=job_id)).json()

    assert (job["id"], job["state"]) == (job_id, "completed")
    assert None not in job["timing"].values()


def test_a_dry_run_tells_what_a_job_would_take(terminal: Terminal, job_id: str) -> None:
    quote = json.loads(terminal.run("http quote"))

    assert (quote["object"], quote["tokens"]["max_output_tokens"]) == ("quote", 64)
    assert quote["cost"]["price_id"] == "cpu"


def test_an_etag_is_answered_with_304_while_nothing_changes(
    terminal: Terminal, ended: Ended, job_id: str
) -> None:
    ended(job_id)

    assert terminal.run("etag", ID=job_id) == "304\n"


def test_a_job_is_followed_token_by_token(terminal: Terminal) -> None:
    events = list(read_events(iter(terminal.run("events").split("\n"))))

    end = events[-1]
    assert end.event == "end" and end.data["complete"]
    assert text_of(events) == end.data["job"]["response"]["choices"][0]["text"] != ""
    assert sum(each.data["tokens"] for each in events if each.event == "tokens") > 1


def test_a_job_is_explained_by_the_command_and_by_the_call(
    terminal: Terminal, ended: Ended, job_id: str
) -> None:
    ended(job_id)

    drawn, _, told = terminal.run("explain", ID=job_id).rpartition("\n")

    timeline = json.loads(told)
    phases = [span["phase"] for span in timeline["spans"]]
    assert {"prefill", "decode", "commit"} <= set(phases)
    assert sum(round(1_000 * span["ms"]) for span in timeline["spans"]) == round(
        1_000 * timeline["total_ms"]
    )
    [attempt] = timeline["attempts"]
    assert timeline["device"]["total_ns"] == attempt["billed_ns"] > 0
    assert [part["use"] for part in timeline["device"]["parts"]] == ["prefill", "decode"]
    assert timeline["summary"] in drawn and "█" in drawn and "\x1b" not in drawn


def test_many_jobs_are_followed_listed_and_cancelled_and_one_is_purged(
    terminal: Terminal, job_id: str
) -> None:
    status, cancelled = map(json.loads, terminal.run("many", ID=job_id).splitlines())

    assert status["items"][0]["id"] == job_id and status["is_final"]
    assert cancelled["refused"] == 0
    assert json.loads(terminal.run("list by metadata"))["object"] == "list"
    assert terminal.run("purge", ID=job_id) == "204\n"


@pytest.fixture
def query(run_sql: Query) -> Query:
    """`query(name)` runs an example."""
    return lambda name: run_sql(EXAMPLES[name][1])


def test_settings_are_recommended_for_traffic_that_is_made_up(terminal: Terminal) -> None:
    assert "recommended" in terminal.run("tune")


def test_a_job_with_a_webhook_is_told_of_and_its_secret_verifies(terminal: Terminal) -> None:
    job = json.loads(terminal.run("webhook", then="\nmv webhook.secret webhook.kept\n"))
    eventually(lambda: job["id"] in terminal.run("webhook list", then="gristmill hooks list\n"))
    signed = """
from app.webhooks.signing import headers_of
from datetime import datetime, UTC
body = b'{"type": "job.completed", "data": {"id": "42"}}'
handle(body, headers_of("evt_1", body, datetime.now(UTC), [os.environ["WEBHOOK_SECRET"]]))
"""
    secret = terminal.run("webhook list", then="cat webhook.kept\n").strip()
    assert terminal.run("webhook verify", then=signed, WEBHOOK_SECRET=secret) == "42\n"


def test_openais_client_makes_an_endpoint(terminal: Terminal) -> None:
    assert terminal.run("webhook endpoint").startswith("whsec_")


def test_the_tables_tell_of_results_cost_batches_and_what_waits(
    query: Query, terminal: Terminal, ended: Ended, system: System, job_id: str
) -> None:
    # given a job that has ended and one that waits
    ended(job_id)
    later = {"body": {"prompt": "Later"}, "not_before": "2999-01-01T00:00:00Z"}
    httpx.post(f"{system.settings.api.url}/v1/jobs", json=later).raise_for_status()

    # then each query finds its own
    last = next(row for row in query("sql last results") if row["job_id"] == UUID(job_id))
    assert (last["state"], last["output_tokens"], last["currency"]) == ("completed", 16, "USD")
    cost = {row["model"]: row for row in query("sql cost")}
    assert cost["smollm2-135m-instruct"]["cost"] > 0
    assert cost["smollm2-135m-instruct"]["cost_per_million_output_tokens"] > 0
    terminal.run("usage of devices")
    assert {row["model"] for row in query("sql energy")} == cost.keys()
    terminal.run("usage page")
    assert "default" in terminal.run("tenants set")
    assert "BilledCost" in terminal.run("usage focus")
    used = query("sql usage")
    assert {row["model"]: row["cost"] for row in used if row["currency"]} == {
        model: row["cost"] for model, row in cost.items()
    }
    assert {row["model"] for row in used} >= {
        line.split("\t")[1] for line in terminal.run("usage by day").splitlines()
    }
    reasons = {row["close_reason"]: row for row in query("sql batches")}
    assert reasons["wait"]["mean_size"] >= 1
    assert reasons["wait"]["padding_share"] == 0  # the stub pads nothing
    assert {row["state"] for row in query("sql waiting")} == {"queued"}

    # and nothing is old enough to be deleted
    assert all(0 <= row["kept"] <= 1 for row in query("sql promises"))
    query("sql delete")
    assert ended(job_id)["state"] == "completed"
