"""The commands about jobs, against an API in memory."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app import cli
from app.api.jobs.schemas_timeline import EXAMPLE
from app.cli import api as api_module
from app.cli.explain import BAR
from app.config.file import Loaded
from app.config.settings import ApiSettings, Settings
from tests.fake_api import FakeApi
from tests.unit.conftest import Gristmill


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., str]:
    """A file of these lines; its path."""

    def write(*lines: str | bytes, end: bytes = b"\n") -> str:
        file = tmp_path / "prompts.jsonl"
        file.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + end for x in lines))
        return str(file)

    return write


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# ── submit ──────────────────────────────────────────────────────────────────────────────────────


def test_a_text_is_submitted_as_a_chat_with_its_settings(gristmill: Gristmill, api: FakeApi):
    code, out, _ = gristmill("submit", "hello", "--set", "max_tokens=8", "--set", "stop=.")

    assert (code, out) == (0, "job-1\n")
    message = {"role": "user", "content": "hello"}
    assert api.submitted[0]["body"] == {"messages": [message], "max_tokens": 8, "stop": "."}


def test_an_answer_is_shown_as_it_comes_and_once(gristmill: Gristmill, api: FakeApi):
    code, out, err = gristmill("submit", "--as", "prompt", "hello", "--stream")

    assert api.submitted[0]["stream_events"] is True
    lines = out.splitlines()
    assert (code, lines[:3]) == (0, ["void", "hello!", "id\tjob-1"])
    assert "begun anew" in err

    api.tells_all = False  # something of the stream was lost
    code, out, _ = gristmill("submit", "--as", "prompt", "again", "--stream")
    assert (code, out.splitlines()[:4]) == (0, ["void", "again!", "again!", "id\tjob-2"])

    code, out, _ = gristmill("submit", "--as", "prompt", "third", "--stream", "--json")
    assert [told["event"] for told in objects(out)][-3:] == ["tokens", "tokens", "end"]
    assert gristmill("submit", "hello", "--dry-run", "--stream")[0] == 2


def test_a_dry_run_tells_when_and_for_how_much_and_submits_nothing(
    gristmill: Gristmill, api: FakeApi, prompts
):
    code, out, _ = gristmill("submit", "hello", "--dry-run")
    fields = dict(line.split("\t") for line in out.splitlines())
    assert (code, fields["position"], fields["tokens"]) == (0, "3", "5 in, 16 out at most")
    assert fields["finish"] == "2027-01-31T12:00:02Z / 2027-01-31T12:00:03Z"
    assert fields["cost"] == "0.000000001–0.000000002 USD"

    file = prompts('{"prompt": "a"}', "", "no JSON", '{"prompt": "b", "model": "gpt-9"}')
    code, out, err = gristmill("submit", "--dry-run", "--file", file)
    assert (code, [row.split("\t")[:2] for row in out.splitlines()]) == (1, [["1", "3"]])
    assert "line 3: would be refused" in err and "line 4: would be refused: No model" in err

    code, out, _ = gristmill("submit", "--dry-run", "--file", file, "--json")
    assert [told["line"] for told in objects(out)] == [1, 3, 4]
    assert gristmill("submit", "hello", "--dry-run", "--wait")[0] == 2
    assert api.submitted == []


def test_a_file_gives_one_job_a_line(gristmill: Gristmill, api: FakeApi, prompts):
    file = prompts('{"prompt": "a"}', "", '{"input": "b"}')

    code, out, _ = gristmill("submit", "--file", file, "--model", "stub", "--json")

    assert code == 0
    assert objects(out) == [{"line": 1, "id": "job-1"}, {"line": 3, "id": "job-2"}]
    assert [each["body"] for each in api.submitted] == [
        {"prompt": "a", "model": "stub"},
        {"input": "b", "model": "stub"},
    ]


def test_options_of_a_job_are_those_of_the_command_or_of_its_line(
    gristmill: Gristmill, api: FakeApi, prompts
):
    own = {"body": {"prompt": "b"}, "idempotency_key": "order-7", "metadata": {"order": "7"}}
    file = prompts('{"prompt": "a"}', json.dumps(own | {"priority": 9}))

    gristmill(
        *("submit", "--file", file, "--idempotency-key", "run", "--priority", "2"),
        *("--deadline", "2h", "--metadata", "customer=42", "--metadata", "team=a=b"),
    )

    first, second = api.submitted
    assert (first["idempotency_key"], second["idempotency_key"]) == ("run-1", "order-7")
    assert first["priority"] == second["priority"] == 2
    assert first["metadata"] == {"customer": "42", "team": "a=b"}
    assert second["metadata"] == {"customer": "42", "team": "a=b", "order": "7"}
    ahead = datetime.fromisoformat(first["deadline"]) - datetime.now(UTC)
    assert timedelta(hours=1.9) < ahead <= timedelta(hours=2)


def test_the_same_file_with_the_same_key_once_more_goes_on_and_doubles_nothing(
    gristmill: Gristmill, api: FakeApi, prompts
):
    # given a run that ended between two pages
    lines = [json.dumps({"prompt": str(n)}) for n in range(1_500)]
    api.before = lambda _: api.troubles.extend([httpx.Response(503)] * (len(api.requests) == 2))
    command = ("submit", "--idempotency-key", "run", "--patience", "0", "--file", prompts(*lines))
    code, first, err = gristmill(*command)
    assert code == 4
    assert len(first.splitlines()) == 1_000
    assert "Stopped after line 1000. The same command once more goes on from there." in err

    # when the same command runs once more
    code, second, _ = gristmill(*command)

    # then every line has its job, the one it had before if it had one
    assert code == 0
    assert second.startswith(first)
    assert [each["body"]["prompt"] for each in api.submitted] == [str(n) for n in range(1_500)]


def test_a_broken_line_is_refused_with_its_number_and_costs_no_other(
    gristmill: Gristmill, api: FakeApi, prompts
):
    file = prompts(
        '{"prompt": "a"}',
        "secret nonsense",
        "[]",
        '{"prompt": "b", "model": "gpt-9"}',
        '{"body": 7}',
        b'{"prompt": "\xff"}',
        "[" * 100_000,
        '{"prompt": NaN}',
        '{"prompt": "c"}',
    )

    code, out, err = gristmill("submit", "--file", file)

    assert code == 1
    assert out == "1\tjob-1\n9\tjob-2\n"
    assert [line.split(":")[0] for line in err.splitlines()] == [
        *(f"line {n}" for n in range(2, 9)),
        "7 of 9 lines were refused.",
    ]
    assert "secret" not in err


odd = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text())
)
fields = st.sampled_from(["body", "prompt", "model", "idempotency_key", "metadata", "deadline"])
objects_of_any_kind = st.dictionaries(fields, st.one_of(odd, st.dictionaries(fields, odd)))
any_line = st.one_of(
    objects_of_any_kind.map(json.dumps).map(str.encode),
    odd.map(json.dumps).map(str.encode),
    st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")),
)


@given(given_=st.lists(any_line), command=st.sampled_from([(), ("--idempotency-key", "k")]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_line_of_any_file_has_its_outcome_in_its_place(
    api: FakeApi, given_: list[bytes], command: tuple[str, ...]
):
    source = io.TextIOWrapper(io.BytesIO(b"\n".join(given_)))
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.stdin", source)
        with pytest.raises(SystemExit) as end:
            cli.main(["submit", "--file", "-", "--json", *command])

    told = objects(out.getvalue())
    numbered = enumerate(given_, 1)
    bom = b"\xef\xbb\xbf"
    expected = [n for n, line in numbered if (line.removeprefix(bom) if n == 1 else line).strip()]
    assert [each["line"] for each in told] == expected
    refused = [each for each in told if "error" in each]
    assert all(("id" in each) != ("error" in each) for each in told)
    assert end.value.code == (1 if refused else 0)


def test_refused_lines_have_their_number_in_json_too(gristmill: Gristmill, prompts):
    file = prompts('{"prompt": "a"}', "nonsense", '{"prompt": "b", "model": "gpt-9"}')

    code, out, _ = gristmill("submit", "--file", file, "--json")

    first, broken, refused = objects(out)
    assert code == 1
    assert first == {"line": 1, "id": "job-1"}
    assert (broken["line"], broken["error"]["code"]) == (2, "invalid_request")
    assert refused["line"] == 3
    assert refused["error"] == {
        "code": "model_not_found",
        "message": "No model 'gpt-9'.",
        "param": "body.model",
    }


@pytest.mark.parametrize(("start", "end"), [(b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n"), (b"", b"")])
def test_byte_order_marks_and_windows_line_ends_are_no_part_of_a_line(
    gristmill: Gristmill, api: FakeApi, prompts, start: bytes, end: bytes
):
    line = '{"prompt": "one\\u2028 two"}'

    code, _, err = gristmill("submit", "--file", prompts(start, line, end=end))

    assert (code, err) == (0, "")
    assert [each["body"]["prompt"] for each in api.submitted] == ["one\u2028 two"]


def test_what_every_line_would_meet_is_said_once(gristmill: Gristmill, api: FakeApi, prompts):
    api.troubles = [httpx.Response(401, json={"code": "unauthorized", "detail": "Give a token."})]

    code, out, err = gristmill("submit", "--file", prompts(*['{"prompt": "a"}'] * 1_500))

    assert (code, out, len(api.requests)) == (1, "", 1)
    assert err.splitlines()[0].startswith("Stopped before any job was accepted.")
    assert err.splitlines()[1] == "gristmill: Give a token."


def test_ids_are_printed_page_by_page_as_they_are_accepted(
    gristmill: Gristmill, api: FakeApi, prompts, capsys: pytest.CaptureFixture[str]
):
    seen: list[str] = []
    api.before = lambda _: seen.append(capsys.readouterr().out)

    gristmill("submit", "--file", prompts(*['{"prompt": "a"}'] * 1_500))

    assert [len(each.splitlines()) for each in seen] == [0, 1_000]


def test_lines_that_come_one_by_one_are_submitted_one_by_one(
    gristmill: Gristmill, api: FakeApi, monkeypatch: pytest.MonkeyPatch
):
    # given a pipe whose writer sends a line whenever the one before was submitted
    reader, writer = os.pipe()
    lines = [b'{"prompt": "b"}\n']
    os.write(writer, b'{"prompt": "a"}\n')

    def go_on(_: httpx.Request) -> None:
        os.write(writer, lines.pop()) if lines else os.close(writer)

    api.before = go_on
    with os.fdopen(reader, "r") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)

        code, out, _ = gristmill("submit", "--file", "-")

    assert (code, out) == (0, "1\tjob-1\n2\tjob-2\n")
    assert len(api.requests) == 2


def test_a_file_is_read_no_further_than_it_is_submitted(gristmill: Gristmill, api: FakeApi):
    class Endless(io.RawIOBase):
        num_bytes = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            line = b'{"prompt": "a"}\n' * (len(buffer) // 16)
            buffer[: len(line)] = line
            Endless.num_bytes += len(line)
            return len(line)

    def stop(_: httpx.Request) -> None:
        if len(api.requests) == 5:
            api.troubles = [httpx.Response(500)]

    api.before = stop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
        code, out, _ = gristmill("submit", "--file", "-")

    assert (code, len(out.splitlines())) == (1, 4_000)
    assert Endless.num_bytes <= 2_000_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_loses_no_id_of_a_job_that_was_accepted(
    gristmill: Gristmill, api: FakeApi, prompts, number: signal.Signals
):
    # given Ctrl-C while the first of two pages is under way
    api.before = lambda _: os.kill(os.getpid(), number)

    code, out, err = gristmill("submit", "--file", prompts(*['{"prompt": "a"}'] * 1_500))

    assert code == 130
    assert len(out.splitlines()) == len(api.submitted) == 1_000
    assert "what is under way is answered first" in err
    assert "Stopped after line 1000." in err


def test_an_interruption_does_not_wait_for_an_api_that_is_away(
    gristmill: Gristmill, api: FakeApi, monkeypatch: pytest.MonkeyPatch
):
    api.troubles = [httpx.ConnectError("refused")] * 100
    monkeypatch.setattr(
        "gristmill_client.sync.time.sleep", lambda _: os.kill(os.getpid(), signal.SIGINT)
    )

    code, _, err = gristmill("submit", "hello")

    assert code == 130
    assert "does not answer (ConnectError). Trying again." in err


@pytest.mark.parametrize("text", ["磨坊" * 1_000, "a/" * 5_000, "a\nb"])
def test_a_text_may_be_what_no_file_is_called(gristmill: Gristmill, api: FakeApi, text: str):
    assert gristmill("submit", "--as", "input", text)[0] == 0
    assert api.submitted[0]["body"] == {"input": text}


def test_a_text_to_classify_goes_to_its_own_call(gristmill: Gristmill, api: FakeApi):
    assert gristmill("submit", "--as", "classify", "--set", "model=sorter", "Dust")[0] == 0

    [sent] = api.submitted
    assert (sent["url"], sent["body"]) == ("/v1/classify", {"input": "Dust", "model": "sorter"})


def test_the_name_of_a_file_is_not_taken_for_a_text(gristmill: Gristmill, prompts):
    file = prompts("{}")

    code, _, err = gristmill("submit", file)

    assert code == 2
    assert "submit its lines with --file" in err.replace("\n", " ")


def test_waiting_shows_the_answer_first_and_then_the_record(gristmill: Gristmill):
    code, out, err = gristmill("submit", "--wait", "--as", "prompt", "round and round")

    assert (code, err) == (0, "accepted: job-1\n")
    assert out.splitlines()[:3] == ["round and round!", "id\tjob-1", "state\tcompleted"]


def test_a_file_that_is_waited_for_gives_a_line_an_answer(gristmill: Gristmill, prompts):
    file = prompts('{"prompt": "a\\nb"}', "nonsense", '{"prompt": "c"}')

    code, out, _ = gristmill("submit", "--wait", "--file", file)

    assert code == 1
    assert sorted(out.splitlines()) == [
        '1\tjob-1\tcompleted\t"a\\nb!"',
        '3\tjob-2\tcompleted\t"c!"',
    ]


# ── results ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("json_or_not", [[], ["--json"]])
def test_answers_are_joined_to_lines_by_id(
    gristmill: Gristmill, api: FakeApi, prompts, tmp_path: Path, json_or_not: list[str]
):
    file = prompts('{"prompt": "a"}', "nonsense", '{"prompt": "b"}')
    _, ids, _ = gristmill("submit", "--file", file, *json_or_not)
    (tmp_path / "ids").write_text(ids)

    code, out, _ = gristmill("results", "--json", "--file", str(tmp_path / "ids"))

    found = {each["line"]: each for each in objects(out)}
    assert found[1]["response"]["choices"][0]["text"] == "a!"
    assert (found[3]["id"], found[3]["state"]) == ("job-2", "completed")
    assert code == (5 if json_or_not else 0)
    assert set(found) == ({1, 2, 3} if json_or_not else {1, 3})


def test_whatever_stands_in_a_file_of_ids_ends_in_no_traceback(
    gristmill: Gristmill, api: FakeApi, tmp_path: Path
):
    api.add("one", "completed", response={"choices": [{"text": "a"}]})
    (tmp_path / "ids").write_text(f"\N{NO-BREAK SPACE}\n{'9' * 5_000} one\n7 one\n", "utf-8")

    code, out, _ = gristmill("results", "--file", str(tmp_path / "ids"))

    assert (code, out) == (0, 'one\tcompleted\t"a"\n7\tone\tcompleted\t"a"\n')


def test_results_are_one_line_each(gristmill: Gristmill, api: FakeApi):
    api.add("one", "completed", response={"choices": [{"text": "a\tb\n\x1b[2J"}]})
    api.add("two", "completed", response={"data": [{"embedding": [0.5, 1.0]}]})
    api.add("three", "failed", error={"code": "engine_crash", "message": "It died."})
    api.add("purged", "completed")

    code, out, _ = gristmill("results", "one", "two", "three", "purged", "four")

    assert code == 5
    assert sorted(out.splitlines()) == sorted(
        [
            'one\tcompleted\t"a\\tb\\n\\u001b[2J"',
            "two\tcompleted\t[0.5, 1.0]",
            'three\tfailed\t{"code": "engine_crash", "message": "It died."}',
            'purged\tcompleted\t{"code": "response_removed", "message": "The job completed, and '
            'its response was removed when its time was over."}',
            'four\tunknown\t{"code": "job_not_found", "message": "No such job."}',
        ]
    )


def test_results_as_text_are_the_answers_and_nothing_else(gristmill: Gristmill, api: FakeApi):
    api.add("one", "completed", response={"choices": [{"text": "two\nlines"}]})
    api.add("two", "completed", response={"choices": [{"message": {"content": "chat"}}]})

    assert gristmill("results", "--text", "one", "two") == (0, "two\nlines\nchat\n", "")
    code, out, err = gristmill("results", "--text", "unknown", "two")
    assert (code, out, err) == (5, "chat\n", "unknown: No such job.\n")


# ── status, cancel, purge ───────────────────────────────────────────────────────────────────────


def test_waiting_for_a_job_shows_its_answer(gristmill: Gristmill, api: FakeApi):
    answer = {"choices": [{"message": {"content": "Good [b]morning[/b]."}}]}
    api.add("0b9f", "completed", response=answer)

    code, out, _ = gristmill("status", "0b9f", "--wait")

    assert code == 0
    assert out.splitlines()[:3] == ["Good [b]morning[/b].", "id\t0b9f", "state\tcompleted"]


@pytest.mark.parametrize("state", ["failed", "cancelled", "expired"])
def test_a_job_without_an_answer_has_an_exit_code_of_its_own(
    gristmill: Gristmill, api: FakeApi, state: str
):
    api.add("0b9f", state, error={"code": "deadline", "message": "The deadline passed first."})

    code, out, _ = gristmill("status", "0b9f")

    assert code == 5
    assert "The deadline passed first." in out


def test_several_jobs_are_shown_one_a_line(gristmill: Gristmill, api: FakeApi):
    api.add("one")
    api.add("two", "failed", error={"code": "engine_crash"})

    code, out, err = gristmill("status", "one", "two", "three")

    assert (code, err) == (1, "three: No such job.\n")
    assert out.splitlines() == [
        "one\tqueued\tstub\t2027-01-31T12:00:00Z\t",
        "two\tfailed\tstub\t2027-01-31T12:00:00Z\tengine_crash",
    ]
    assert gristmill("status", "one", "two")[0] == 5
    assert gristmill("status", "one", "--json")[0] == 0


def test_jobs_are_shown_and_cancelled_by_what_they_are(gristmill: Gristmill, api: FakeApi):
    api.add("one")
    api.add("two", "running")
    choice = ("--model", "stub", "--metadata", "customer=42")

    code, out, _ = gristmill("status", "--state", "queued", *choice)
    assert (code, [line.split("\t")[0] for line in out.splitlines()]) == (0, ["one"])
    assert api.requests[-1].url.params["metadata[customer]"] == "42"

    code, out, _ = gristmill("cancel", *choice)
    assert (code, out) == (0, "one\tcancelled\ntwo\trunning\n")
    asked = json.loads(api.requests[-1].content)
    assert asked["filter"] == {"model": "stub", "metadata": {"customer": "42"}}


def test_several_jobs_are_cancelled_and_a_refusal_costs_no_other(
    gristmill: Gristmill, api: FakeApi
):
    api.add("one")
    api.add("two")

    code, out, err = gristmill("cancel", "one", "unknown", "two")

    assert (code, out) == (1, "one\tcancelled\ntwo\tcancelled\n")
    assert err == "unknown: No such job.\n"
    assert objects(gristmill("cancel", "one", "--json")[1]) == [{"id": "one", "state": "cancelled"}]


def test_purging_asks_first(gristmill: Gristmill, api: FakeApi, monkeypatch: pytest.MonkeyPatch):
    api.add("one")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert gristmill("purge", "one")[0] == 130
    assert "one" in api.jobs

    assert gristmill("purge", "one", "two", "--yes")[0] == 1
    assert "one" not in api.jobs


# ── explain ─────────────────────────────────────────────────────────────────────────────────────


def test_a_timeline_is_drawn_from_left_to_right_and_every_nanosecond_is_listed(
    gristmill: Gristmill, api: FakeApi
):
    api.add("a", timeline=EXAMPLE)

    code, out, err = gristmill("explain", "a")

    lines = out.splitlines()
    bars = [line[39:] for line in lines if "█" in line]
    assert (code, err) == (0, "")
    assert "Completed after 640.300 ms." in lines
    assert [line.split()[-2] for line in lines if "█" in line]
    assert [bar.index("█") for bar in bars] == sorted(bar.index("█") for bar in bars)
    assert max(map(len, bars)) <= BAR + 2
    assert "decode               360,000,000   87.4       0.000003600      27.400" in lines
    assert "energy: 31.500 J of its answer; measured, of the gpu" in lines
    assert "    and 1 that are not yours" in lines


def test_a_timeline_is_json_when_asked_for(gristmill: Gristmill, api: FakeApi):
    api.add("a", timeline=EXAMPLE)

    code, out, _ = gristmill("explain", "a", "--json")

    assert (code, json.loads(out)) == (0, EXAMPLE)


def test_attempts_are_told_apart_and_one_that_runs_has_no_end_yet(
    gristmill: Gristmill, api: FakeApi
):
    [attempt] = EXAMPLE["attempts"]
    lost = attempt | {"outcome": "lost", "error_code": "worker_lost"}
    runs = attempt | {"number": 2, "outcome": None, "batch": attempt["batch"] | {"jobs": None}}
    worker = attempt["worker"] | {"up": False}
    taken = {"total_ns": 0, "billed_ns": 0, "wasted_ns": 0, "parts": []}
    api.add("a", timeline=EXAMPLE | {"attempts": [lost, runs], "worker": worker, "device": taken})

    _, out, _ = gristmill("explain", "a")

    assert "attempt 1: lost after 536.083 ms, worker_lost; worker celery@gpu-1" in out
    assert "attempt 2: has run for 536.083 ms; worker celery@gpu-1" in out
    assert "with worker celery@gpu-1, which is lost" in out
    assert "prefill 1 " in out and "device time" not in out


def test_a_job_of_no_length_and_a_phase_of_a_newer_version_are_told_all_the_same(
    gristmill: Gristmill, api: FakeApi
):
    api.add("none", timeline=EXAMPLE | {"spans": [], "total_ms": 0.0, "attempts": []})
    newer = EXAMPLE["spans"][0] | {"phase": "weighed\x1b[31m", "ms": 0.0, "adjusted": True}
    api.add("newer", timeline=EXAMPLE | {"spans": [newer], "total_ms": 0.0})

    assert gristmill("explain", "none")[0] == 0
    code, out, _ = gristmill("explain", "newer")

    assert code == 0 and "weighed" in out and "  adjusted" in out and "\x1b" not in out


def test_an_unknown_job_is_explained_by_nobody(gristmill: Gristmill):
    assert gristmill("explain", "nonsense") == (1, "", "gristmill: No such job.\n")


# ── jobs ────────────────────────────────────────────────────────────────────────────────────────


def test_jobs_are_listed_with_what_went_wrong(gristmill: Gristmill, api: FakeApi):
    api.add("0b9f", "failed", error={"code": "engine_crash"})

    code, out, _ = gristmill("jobs", "list", "--state", "failed", "--since", "2027-01-01T00:00Z")

    assert (code, out) == (0, "0b9f\tfailed\tstub\t2027-01-31T12:00:00Z\tengine_crash\n")
    asked = api.requests[-1].url.params
    assert (asked["state"], asked["limit"]) == ("failed", "50")
    assert datetime.fromisoformat(asked["since"]) == datetime(2027, 1, 1, tzinfo=UTC)

    code, out, _ = gristmill("jobs", "list", "--json", "--since", "12h")
    assert [each["id"] for each in objects(out)] == ["0b9f"]
    ago = datetime.now(UTC) - datetime.fromisoformat(api.requests[-1].url.params["since"])
    assert timedelta(hours=12) <= ago < timedelta(hours=13)


def test_jobs_that_are_named_are_replayed_and_a_refusal_does_not_stop_the_others(
    gristmill: Gristmill, api: FakeApi
):
    for job_id in ("one", "two"):
        api.add(job_id, "failed")
    api.add("kept", "failed", is_removed=True)

    code, out, err = gristmill("jobs", "replay", "one", "kept", "two")

    assert (code, out, err) == (1, "one\tnew-one\ntwo\tnew-two\n", "kept: It is not there.\n")


def test_jobs_that_are_chosen_are_replayed_if_they_ended_badly(gristmill: Gristmill, api: FakeApi):
    api.add("good", "completed")
    api.add("0b9f", "expired")

    code, out, _ = gristmill("jobs", "replay", "--error-code", "worker_lost", "--json")

    assert (code, objects(out)) == (0, [{"id": "new-0b9f", "replay_of": "0b9f"}])
    asked = [dict(request.url.params) for request in api.requests if request.method == "GET"]
    assert [each["state"] for each in asked] == ["cancelled", "expired", "failed"]
    assert {each["error_code"] for each in asked} == {"worker_lost"}


@pytest.mark.parametrize(
    "arguments", [[], ["one", "--state", "failed"], ["--since", "yesterday"], ["--state", "late"]]
)
@pytest.mark.parametrize("command", [["jobs", "replay"], ["cancel"], ["status"]])
def test_nothing_or_two_things_at_once_is_wrong_usage(
    gristmill: Gristmill, command: list[str], arguments: list[str]
):
    assert gristmill(*command, *arguments)[0] == 2


# ── where it goes, and what comes out ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", ["options", "environment"])
def test_the_api_and_its_key_are_said_by_options_or_the_environment(
    gristmill: Gristmill, api: FakeApi, monkeypatch: pytest.MonkeyPatch, way: str
):
    api.add("one")
    url, options = "http://gristmill.example:81", []
    if way == "options":
        options = ["--api-url", url, "--key", "0123456789abcdef"]
    else:
        monkeypatch.setenv("GRISTMILL_API_URL", url)
        monkeypatch.setenv("GRISTMILL_API__KEY", "0123456789abcdef")

    assert gristmill("status", "one", *options)[0] == 0

    assert str(api.requests[0].url) == f"{url}/v1/jobs/one"
    assert api.requests[0].headers["authorization"] == "Bearer 0123456789abcdef"


def test_the_key_of_the_settings_goes_to_the_api_of_the_settings_alone(
    gristmill: Gristmill, api: FakeApi, monkeypatch: pytest.MonkeyPatch
):
    api.add("one")
    ours = Settings(api=ApiSettings(key="0123456789abcdef"))
    loaded = Loaded(ours, {}, Path("my.toml"))
    monkeypatch.setattr(api_module, "load_settings", lambda: loaded)

    gristmill("status", "one")
    gristmill("status", "one", "--api-url", "http://gristmill.example")

    here, another = (request.headers for request in api.requests)
    assert here["authorization"] == "Bearer 0123456789abcdef"
    assert "authorization" not in another


def test_an_address_that_is_none_is_wrong_usage(gristmill: Gristmill):
    code, _, err = gristmill("status", "one", "--api-url", "localhost:8000")

    assert code == 2
    assert "http://" in err


def test_what_goes_to_a_pipe_is_whole_and_plain_however_wide_a_terminal_is(
    gristmill: Gristmill, api: FakeApi, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    job_id, model = "0b9f1c5e-6c8f-4d3a-9a3f-0d9b7f2f6a11", "a-model-with-a-name-" + "x" * 200
    api.add(job_id, "failed", model=model, error={"code": "c", "message": "word " * 100})

    _, listed, _ = gristmill("jobs", "list")
    _, shown, _ = gristmill("status", job_id)

    assert listed == f"{job_id}\tfailed\t{model}\t2027-01-31T12:00:00Z\tc\n"
    assert "word " * 100 in shown
    assert "\x1b" not in listed + shown


def test_a_terminal_gets_a_table(
    gristmill: Gristmill, api: FakeApi, monkeypatch: pytest.MonkeyPatch
):
    api.add("0b9f", "failed", error={"code": "engine_crash"})
    monkeypatch.setattr("app.cli.terminal.PlainConsole.is_terminal", True)

    _, out, _ = gristmill("jobs", "list")

    head, row = out.splitlines()
    assert head.split() == ["id", "state", "model", "accepted", "error"]
    assert row.split()[:2] == ["0b9f", "failed"]
