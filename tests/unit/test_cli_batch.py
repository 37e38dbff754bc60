"""`gristmill batch run`, against an API in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fake_api import FakeApi
from tests.unit.conftest import Gristmill


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A file of requests in the forms of several doors."""
    chat = {"messages": [{"role": "user", "content": "b"}]}
    values: list[Any] = [
        {"prompt": "a"},
        {"custom_id": "two", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "three", "params": {"max_tokens": 1, **chat}},
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(map(json.dumps, values)) + "\n")
    return file


def told(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_line_is_answered_whichever_door_it_is_written_for(
    gristmill: Gristmill,
    api: FakeApi,
    lines: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.jsonl"

    code, _, err = gristmill("batch", "run", str(lines), "-o", str(out), "--model", "stub")

    assert (code, "3 lines: 0 failed" in err) == (0, True)
    assert {each["custom_id"] for each in told(out)} == {"line-1", "two", "three"}
    assert all(each["error"] is None and each["response"]["body"] for each in told(out))
    assert [each.get("url") for each in api.submitted] == [
        None,
        "/v1/chat/completions",
        "/v1/messages",
    ]
    assert all(each["body"]["model"] == "stub" for each in api.submitted)
    assert all(each["priority"] == 6 for each in api.submitted)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_an_interrupted_run_goes_on_and_runs_nothing_twice(
    gristmill: Gristmill,
    api: FakeApi,
    lines: Path,
    tmp_path: Path,
) -> None:
    # given a run that lost the API with its jobs submitted, and was cut off within a line
    out = tmp_path / "out.jsonl"
    command = ("batch", "run", str(lines), "-o", str(out), "--deadline", "12h", "--patience", "0")
    api.before = lambda request: api.troubles.extend(
        [httpx.ConnectError("refused")] if request.url.path.endswith("status") else []
    )
    assert gristmill(*command)[0] == 4
    assert len(api.submitted) == 3
    whole = json.dumps({"custom_id": "line-1", "response": {"body": {}}, "error": None})
    out.write_text(f'{whole}\n{{"custom_id": "tw')
    api.before = lambda request: None

    # when the same command is run again, and once more
    assert gristmill(*command)[0] == 0
    answers = told(out)
    assert gristmill(*command)[0] == 0

    # then each line has one answer, and each was one job
    assert sorted(each["custom_id"] for each in answers) == ["line-1", "three", "two"]
    assert told(out) == answers
    assert len(api.submitted) == 3


def test_what_has_no_answer_says_why(
    gristmill: Gristmill,
    api: FakeApi,
    tmp_path: Path,
) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(
        'no JSON\n{"prompt": "a", "model": "gpt-9"}\n{"custom_id": 7, "prompt": "a"}\n'
        '{"custom_id": "x", "method": "GET", "body": {"prompt": "a"}}\n\n{"prompt": "good"}\n'
    )

    code, _, err = gristmill("batch", "run", str(file), "-o", str(out))

    errors = {each["custom_id"]: each["error"] for each in told(out)}
    assert (code, "5 lines: 4 failed" in err) == (5, True)
    assert errors.pop("line-6") is None
    assert [errors[name]["code"] for name in ("line-1", "line-2", "line-3", "x")] == [
        "invalid_request",
        "model_not_found",
        "invalid_request",
        "invalid_request",
    ]
    assert len(api.submitted) == 1


@pytest.mark.parametrize(
    ("status", "code", "exits"),
    [
        (401, "unauthorized", 1),
        (429, "quota_exceeded", 4),
        (429, "insufficient_quota", 4),
        (500, "internal_error", 1),
    ],
)
def test_what_all_lines_would_meet_ends_none_of_them(
    gristmill: Gristmill,
    api: FakeApi,
    lines: Path,
    tmp_path: Path,
    status: int,
    code: str,
    exits: int,
) -> None:
    # given an API that refuses whatever the lines say
    out = tmp_path / "out.jsonl"
    command = ("batch", "run", str(lines), "-o", str(out))
    problem = {"code": code, "detail": "Why."}
    api.troubles = [
        httpx.Response(status, json=problem, headers={"x-should-retry": "false"}),
    ]

    # when a run meets that, and the same command is run again
    first, _, err = gristmill(*command)
    written = out.read_bytes()

    # then no line was given up, and all are answered in the end
    assert (first, "Why." in err, "same command once more" in err) == (exits, True, True)
    assert written == b""
    assert gristmill(*command)[0] == 0
    assert len(told(out)) == 3


def test_wrong_files_are_refused_before_anything_is_submitted(
    gristmill: Gristmill,
    api: FakeApi,
    lines: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.jsonl"
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text(2 * '{"custom_id": "a", "body": {"prompt": "a"}}\n')

    code, _, err = gristmill("batch", "run", str(doubled), "-o", str(out))
    assert (code, "Lines 1 and 2 have the same custom_id" in err) == (2, True)

    code, _, err = gristmill("batch", "run", str(lines), "-o", str(lines))
    assert (code, "was not written by" in err) == (2, True)
    assert len(told(lines)) == 3  # as it was
    for foreign in ('{"prompt": "a"}', '{"custom_id": "a", "error": null}', "notes"):
        lines.write_text(foreign)  # a line without its end is no line that was cut off, either
        code, _, err = gristmill("batch", "run", str(lines), "-o", str(lines))
        assert (code, "was not written by" in err, lines.read_text()) == (2, True, foreign)
    assert not lines.with_name("in.jsonl.run").exists()
    assert gristmill("batch", "run", str(lines), "-o", str(tmp_path / "no" / "out"))[0] == 1
    for device in ("/dev/full", "/dev/null", "-"):
        code, _, err = gristmill("batch", "run", str(lines), "-o", device)
        assert (code, "this is none" in err) == (2, True)
    assert api.submitted == []


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 400), max_size=4))
def test_whatever_is_left_of_the_answers_each_line_has_one_in_the_end(
    gristmill: Gristmill,
    api: FakeApi,
    lines: Path,
    tmp_path: Path,
    cuts: list[int],
) -> None:
    out = tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)

    for cut in cuts:
        gristmill("batch", "run", str(lines), "-o", str(out))
        out.write_bytes(out.read_bytes()[:cut])
    gristmill("batch", "run", str(lines), "-o", str(out))

    assert sorted(each["custom_id"] for each in told(out)) == ["line-1", "three", "two"]


def test_answers_are_never_taken_for_those_of_other_lines(
    gristmill: Gristmill, api: FakeApi, lines: Path, tmp_path: Path
) -> None:
    # given a run that was interrupted when one line had ended
    out = tmp_path / "out.jsonl"
    command = ("batch", "run", str(lines), "-o", str(out), "--patience", "0")
    api.before = lambda request: api.troubles.extend(
        [httpx.ConnectError("refused")] if request.url.path.endswith("status") else []
    )
    lines.write_text(f"no JSON\n{lines.read_text()}")
    assert gristmill(*command)[0] == 4
    assert [each["custom_id"] for each in told(out)] == ["line-1"]
    api.before = lambda request: None

    # when the file of requests is another one
    asked = lines.read_text()
    lines.write_text(f'{{"prompt": "first"}}\n{asked}')
    code, _, err = gristmill(*command)

    # then nothing is submitted; as it was, or with more lines, the run goes on
    assert (code, "may be those of other lines" in err, len(api.submitted)) == (2, True, 3)
    lines.write_text(f'{asked}{{"prompt": "last"}}\n')
    assert gristmill(*command)[0] == 5
    names = sorted(each["custom_id"] for each in told(out))
    assert names == ["line-1", "line-2", "line-5", "three", "two"]
    assert len(api.submitted) == 4


def test_a_file_of_somebody_else_beside_the_answers_is_left_alone(
    gristmill: Gristmill, api: FakeApi, lines: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "out.jsonl.run"
    for content in ("notes", f"batch-{32 * 'a'} notes", "\udcff"):
        theirs.write_text(content, errors="surrogateescape")

        code, _, err = gristmill("batch", "run", str(lines), "-o", str(tmp_path / "out.jsonl"))

        assert (code, "was not written by" in err) == (2, True)
        assert theirs.read_text(errors="surrogateescape") == content
    assert api.submitted == []


def test_lines_of_a_pipe_are_run_before_there_are_more(
    gristmill: Gristmill, api: FakeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second line is written when the first one is answered."""
    out = tmp_path / "out.jsonl"
    read, write = os.pipe()
    os.write(write, b'{"prompt": "a"}\n')

    def after_the_first(request: httpx.Request) -> None:
        if request.url.path.endswith("status") and len(api.submitted) == 1:
            os.write(write, b'{"prompt": "b"}\n')
            os.close(write)
            api.before = lambda request: None

    api.before = after_the_first
    with os.fdopen(read, "rb") as pipe:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=pipe))
        code, _, _ = gristmill("batch", "run", "-", "-o", str(out))

    assert code == 0
    assert [each["custom_id"] for each in told(out)] == ["line-1", "line-2"]
