"""The command line: one clear line for an error, and an exit code that says which kind."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app import cli
from app.cli import jobs
from app.client import Job, JobFailed
from app.errors import (
    ConfigError,
    GristmillError,
    JobNotFound,
    RequestError,
    RequestRemoved,
    SchemaError,
    Unavailable,
)
from app.jobs import JobState


@pytest.fixture
def gristmill(capsys: pytest.CaptureFixture[str]):
    """Run a command in this process; (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def job(state: JobState, **more: Any) -> Job:
    raw = {"id": "0b9f", "state": state.value, "model": "stub", **more}
    return Job("0b9f", state, more.get("response"), more.get("error"), raw)


class FakeApi:
    """The client, with answers made up by the test."""

    def __init__(self, *jobs: Job | GristmillError) -> None:
        self._jobs = list(jobs)
        self.submitted: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit_many(self, submissions):
        self.submitted = [each["body"] for each in submissions]
        return [each if isinstance(each, GristmillError) else each.id for each in self._jobs]

    def job(self, job_id: str) -> Job:
        answer = self._jobs.pop(0)
        if isinstance(answer, GristmillError):
            raise answer
        return answer

    wait = cancel = job

    def jobs(self, **filters: Any) -> list[Job]:
        self.asked.append(filters)
        return [each for each in self._jobs if filters.get("state") in (None, each.state)]

    def replay(self, job_id: str) -> Job:
        if job_id == "kept":
            raise RequestRemoved()
        return Job(f"new-{job_id}", JobState.QUEUED, None, None, {})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch):
    def answer(*answers: Job | GristmillError) -> FakeApi:
        fake = FakeApi(*answers)
        monkeypatch.setattr(jobs, "_client", lambda: fake)
        return fake

    return answer


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("max_tokens is wrong"), 1),
        (JobNotFound(), 1),
        (ConfigError("worker.lease_s is wrong"), 3),
        (SchemaError("too old"), 3),
        (Unavailable("nobody there"), 4),
        (JobFailed(job(JobState.FAILED)), 5),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(gristmill, api, error: GristmillError, code: int):
    api(error)

    exit_code, out, err = gristmill("status", "0b9f")

    assert exit_code == code
    assert out == ""
    assert err == f"gristmill: {error}\n"


def test_wrong_usage_is_told_apart(gristmill):
    assert gristmill("nonsense")[0] == 2
    assert gristmill("submit")[0] == 2
    assert gristmill("submit", "text", "--set", "temperature")[0] == 2
    assert gristmill("config", "get", "api.prot")[0] == 2


def test_a_wrong_setting_names_file_and_line(gristmill, tmp_path: Path):
    file = tmp_path / "my.toml"
    file.write_text("[api]\nprot = 1\n")

    code, _, err = gristmill("--config", str(file), "config", "show")

    assert code == 3
    assert f"{file.name} line 2: api.prot is not a setting; did you mean port?" in err


def test_config_show_tells_where_a_value_comes_from(gristmill, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", "postgresql://me:secret@host/name")

    code, out, _ = gristmill("config", "show", "--json")

    shown = json.loads(out)["database.url"]
    assert code == 0
    assert shown["value"] == "postgresql://me:***@host/name"
    assert shown["source"] == "environment variable GRISTMILL_DATABASE__URL"


def test_a_text_is_submitted_as_a_chat_with_its_settings(gristmill, api):
    fake = api(job(JobState.QUEUED))

    code, out, _ = gristmill("submit", "hello", "--set", "max_tokens=8", "--set", "stop=.")

    assert (code, out) == (0, "0b9f\n")
    message = {"role": "user", "content": "hello"}
    assert fake.submitted == [{"messages": [message], "max_tokens": 8, "stop": "."}]


def test_a_file_gives_one_job_a_line(gristmill, api, monkeypatch: pytest.MonkeyPatch):
    fake = api(job(JobState.QUEUED), job(JobState.QUEUED))
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "a"}\n\n{"input": "b"}\n'))

    code, out, _ = gristmill("submit", "--file", "-", "--model", "stub", "--json")

    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [{"id": "0b9f"}] * 2
    assert fake.submitted == [{"prompt": "a", "model": "stub"}, {"input": "b", "model": "stub"}]


def test_a_line_that_is_not_json_is_named(gristmill, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "a"}\nnonsense\n'))

    code, _, err = gristmill("submit", "--file", "-")

    assert code == 2
    assert "line 2 is not JSON" in err


def test_waiting_for_a_job_shows_its_answer(gristmill, api):
    answer = {"choices": [{"message": {"content": "Good [b]morning[/b]."}}]}
    api(job(JobState.COMPLETED, response=answer))

    code, out, _ = gristmill("status", "0b9f", "--wait")

    assert code == 0
    assert "completed" in out
    assert "Good [b]morning[/b]." in out


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED])
def test_a_job_without_an_answer_has_an_exit_code_of_its_own(gristmill, api, state: JobState):
    api(job(state, error={"code": "deadline", "message": "The deadline passed first."}))

    code, out, _ = gristmill("status", "0b9f")

    assert code == 5
    assert "The deadline passed first." in out


def test_jobs_are_listed_with_what_went_wrong(gristmill, api):
    fake = api(job(JobState.FAILED, error={"code": "engine_crash"}, created_at="2027-01-31T12:00Z"))

    code, out, _ = gristmill("jobs", "list", "--state", "failed", "--since", "2027-01-01T00:00Z")

    assert code == 0
    assert "0b9f" in out and "engine_crash" in out
    [asked] = fake.asked
    assert (asked["state"], asked["limit"]) == ("failed", 50)
    assert asked["since"] == datetime(2027, 1, 1, tzinfo=UTC)

    code, out, _ = gristmill("jobs", "list", "--json", "--since", "12h")
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["0b9f"]
    ago = datetime.now(UTC) - fake.asked[1]["since"]
    assert timedelta(hours=12) <= ago < timedelta(hours=13)


def test_jobs_that_are_named_are_replayed_and_a_refusal_does_not_stop_the_others(gristmill, api):
    api()

    code, out, err = gristmill("jobs", "replay", "one", "kept", "two")

    assert (code, out) == (1, "one new-one\ntwo new-two\n")
    assert "kept: The job's request is not there" in err


def test_jobs_that_are_chosen_are_replayed_if_they_ended_badly(gristmill, api):
    fake = api(job(JobState.COMPLETED), job(JobState.EXPIRED))

    code, out, _ = gristmill("jobs", "replay", "--error-code", "worker_lost", "--json")

    assert (code, json.loads(out)) == (0, {"id": "new-0b9f", "replay_of": "0b9f"})
    assert [asked["state"] for asked in fake.asked] == ["cancelled", "expired", "failed"]
    assert {asked["error_code"] for asked in fake.asked} == {"worker_lost"}


@pytest.mark.parametrize(
    "arguments", [[], ["one", "--state", "failed"], ["--since", "yesterday"], ["--state", "late"]]
)
def test_a_replay_of_nothing_or_of_two_things_at_once_is_wrong_usage(gristmill, arguments):
    assert gristmill("jobs", "replay", *arguments)[0] == 2


def test_migrating_down_asks_how_far(gristmill, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", "postgresql://host/name")
    monkeypatch.setenv("GRISTMILL_BROKER__URL", "redis://host")

    code, _, err = gristmill("migrate", "down")

    assert code == 2
    assert "--to REVISION" in err
