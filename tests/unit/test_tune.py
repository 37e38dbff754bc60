"""Traces, what settings make of them, and the command that says which to take."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import cli
from app.config.file import load
from app.config.settings import Policy
from app.tune import trace
from app.tune.frontier import Bench, Point, Setting, cheapest, fitted, frontier, ratios
from app.tune.joined import replay_joined, step
from app.tune.replay import Arrival, replay
from app.tune.trace import TraceError, Traffic, synthetic
from app.worker.batcher import Limits
from app.worker.policy import StepCost

MS = 1_000_000
COST = StepCost(100 * MS, 8 * MS)

# ── traces ───────────────────────────────────────────────────────────────────────────────────────


@given(
    st.lists(
        st.builds(
            Arrival,
            at_ns=st.integers(0, 10**15),
            rows=st.integers(1, 4096),
            prompt_tokens=st.integers(0, 10**9),
            output_tokens=st.integers(0, 10**9),
        ),
        min_size=2,
        max_size=9,
    )
)
def test_a_trace_that_is_written_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, jobs: list[Arrival]
) -> None:
    file = tmp_path_factory.mktemp("trace") / "trace.csv"
    jobs = trace.from_zero(sorted(jobs, key=lambda job: job.at_ns))

    trace.write(jobs, file)

    for before, after in zip(jobs, trace.read(file), strict=True):
        assert after.at_ns == pytest.approx(before.at_ns, abs=1)
        assert (after.rows, after.prompt_tokens) == (before.rows, before.prompt_tokens)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty; its first line names the columns: at_s, sequences,"),
        ("at_s\n", "holds no jobs."),
        ("at_s\n3\n", "holds one job: there is no company to wait for"),
        ("at_s\n2\n1\n", "line 3: at_s 1 is before the line above (2); sort the file by time."),
        ("at_s\n1\n-2\n", "line 3: at_s must be from 0 to 1e+15."),
        ("at_s\n1\nnan\n", "line 3: at_s must be from 0"),
        ("at_s\n1\nsoon\n", "line 3: at_s is not a number."),
        ("at_s\n0\n2e9\n", "line 3: at_s is 1e+09 seconds after the first."),
        ("at_s,sequences\n1,1.5\n", "line 2: sequences is not a whole number."),
        ("at_s,sequences\n1,-1\n", "line 2: sequences must be from 0 to 4096."),
        ("at_s,sequence\n1,1\n", "line 1: sequence is no column; did you mean sequences?"),
        ("at_s,colour\n1,1\n", "line 1: colour is no column; known are at_s, sequences,"),
        ("at_s,at_s\n1,1\n", "line 1: a column is there twice."),
        ("sequences\n1\n", "line 1: the column at_s is missing."),
        ("at_s\n1,2\n", "line 2: 2 cells under 1 columns."),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(
    tmp_path: Path, text: str, complaint: str
) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)

    with pytest.raises(TraceError) as caught:
        trace.checked(trace.read(file), str(file))

    assert complaint in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_trace_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "trace.bin"
    binary.write_bytes(b"\xff\xfe\x00")

    for file, complaint in ((tmp_path / "none", "No such file"), (binary, "no text in UTF-8")):
        with pytest.raises(TraceError, match=complaint):
            trace.read(file)


@pytest.mark.parametrize("shape", ["swing", "steps", "bursts"])
def test_made_up_traffic_has_the_rates_that_were_asked_for(shape: str) -> None:
    jobs = synthetic(f"{shape}:2-200/30", 20_000)

    ends = [job.at_ns / 1e9 for job in jobs]
    assert ends == sorted(ends)
    for place in range(10):  # each tenth of a period against the mean of its rate
        traffic = Traffic.of(f"{shape}:2-200/30")
        spans = [(30 * k + 3 * place, 30 * k + 3 * place + 3) for k in range(int(ends[-1] // 30))]
        came = sum(low <= at < high for at in ends for low, high in spans)
        expected = sum(
            3 * mean(traffic.rate(low + 3 * (step + 0.5) / 100) for step in range(100))
            for low, _ in spans
        )
        assert abs(came - expected) < 6 * math.sqrt(expected) + 6


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("", "no such traffic"),
        ("waves:1-2/3", "no such traffic"),
        ("constant", "say constant:RATE"),
        ("constant:0", "rates must rise, from 0.000001"),
        ("constant:-1", "say constant:RATE"),
        ("constant:nan", "say constant:RATE"),
        ("constant:1-2/3", "say constant:RATE"),
        ("swing:5", "say swing:LOW-HIGH/PERIOD"),
        ("swing:100-1/60", "rates must rise"),
        ("swing:1-100/0", "a period must be"),
        ("swing:0.001-0.01/1", "fewer than 0.1 jobs come in a period"),
    ],
)
def test_traffic_that_cannot_be_made_up_is_refused(spec: str, complaint: str) -> None:
    with pytest.raises(TraceError) as caught:
        synthetic(spec, 10)

    assert complaint in str(caught.value)


# ── replays ──────────────────────────────────────────────────────────────────────────────────────


def test_a_replay_is_what_a_fixed_wait_does_by_hand() -> None:
    # given three jobs that share a batch of three, and one that comes while it runs
    jobs = [Arrival(at * MS) for at in (0, 10, 20, 30)]

    outcome = replay(jobs, Limits(3, 10**9, 50 * MS), COST)

    # then the batch is full at 20 ms; the last waits its 50 ms, and for the device until 144 ms
    assert outcome.sizes == [3, 1]
    assert sorted(each / MS for each in outcome.latencies_ns) == [124, 134, 144, 144 + 108 - 30]


def test_the_next_full_batch_begins_the_moment_the_other_is_over() -> None:
    outcome = replay([Arrival(0)] * 8, Limits(4, 10**9, 10_000 * MS), COST)

    assert outcome.sizes == [4, 4]
    assert outcome.ended_ns == outcome.device_ns == 2 * COST.of(4)


def test_a_job_of_more_sequences_than_a_batch_may_have_fills_one() -> None:
    assert replay([Arrival(0, rows=99)] * 2, Limits(4, 10**9, 0), COST).sizes == [4, 4]


# ── the frontier ─────────────────────────────────────────────────────────────────────────────────


@functools.cache
def bench() -> Bench:
    made = Bench(synthetic("swing:1-100/20", 300), COST, 10**9)
    made.search([16, 32, 64], Setting(64, 100.0))
    return made


def test_no_setting_is_quicker_and_cheaper_than_one_on_the_frontier() -> None:
    points = list(bench().points.values())

    best = frontier(points)

    for point in best:
        assert not any(
            other.p95_ms <= point.p95_ms and other.device_s < point.device_s for other in points
        )
    assert [point.p95_ms for point in best] == sorted(point.p95_ms for point in best)


def test_every_setting_that_is_tried_runs_all_jobs_and_keeps_its_bounds() -> None:
    made = bench()

    assert {setting.policy for setting in made.points} == set(Policy)
    for setting, point in made.points.items():
        assert point.jobs == 300
        assert point.largest <= setting.max_batch_size
        assert 0 < point.busy <= 1


def test_the_cheapest_keeps_the_p95_and_there_may_be_none() -> None:
    points = list(bench().points.values())
    tightest = min(point.p95_ms for point in points)

    kept = cheapest(points, 1.2 * tightest)

    assert kept is not None
    assert kept.p95_ms <= 1.2 * tightest
    assert cheapest(points, 0.99 * tightest) is None


def test_policies_are_compared_where_both_keep_the_same_p95() -> None:
    for each in ratios(list(bench().points.values()), (1.0, 1.5, 2.0)):
        assert each.fixed.setting.policy is Policy.FIXED
        assert each.adaptive.setting.policy is Policy.ADAPTIVE
        assert max(each.fixed.p95_ms, each.adaptive.p95_ms) <= each.p95_ms


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 64), st.integers(-5, 10**12)), max_size=40))
def test_a_fit_needs_a_batch_that_ran(batches: list[tuple[int, int]]) -> None:
    found = fitted(batches)

    assert (found is None) == (not any(rows > 0 and took > 0 for rows, took in batches))


def test_a_fit_of_many_batches_is_what_they_took() -> None:
    found = fitted([(rows, round(COST.of(rows))) for rows in range(1, 65)])

    assert found is not None
    cost, off = found
    assert (cost.fixed_ns, cost.row_ns) == pytest.approx((COST.fixed_ns, COST.row_ns), rel=0.05)
    assert off < 0.01


# ── the command ──────────────────────────────────────────────────────────────────────────────────

MODELS = """
[models.texts]
source = "stub"
kind = "embed"
engine = "stub"
default = true
max_batch_size = 32
max_wait_ms = 50.0

[models."chat.v1"]
source = "stub"
kind = "generate"
engine = "stub"
default = true
options = { joins = true }
"""
PRICES = '[prices.cpu]\nper_device_hour = "3.6"\ncurrency = "EUR"\n'
MADE = ("texts", "--synthetic", "swing:1-100/20", "--step-ms", "100,8", "--jobs", "80")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {"default": f'cache_dir = "{tmp_path}/cache"\n', "models": MODELS, "prices": PRICES}
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    monkeypatch.setenv("GRISTMILL_CONFIG", str(tmp_path / "default.toml"))
    return tmp_path


@pytest.fixture
def tune(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Run the command in this process; (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["tune", *arguments])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_what_is_recommended_is_taken_by_the_settings(tune, folder: Path) -> None:
    lines, html, saved = (folder / name for name in ("new.toml", "page.html", "trace.csv"))

    code, out, err = tune(
        *MADE, "--write", str(lines), "--html", str(html), "--save-trace", str(saved)
    )

    assert code == 0, err
    assert "recommended\t" in out and "Recommended: p95" in err
    with open(folder / "default.toml", "a") as settings_file:
        settings_file.write(lines.read_text())
    model = load(folder / "default.toml", {}).settings.models["texts"]
    assert f"max_wait_ms = {model.max_wait_ms}" in lines.read_text()
    assert model.max_batch_size <= 32
    assert html.read_text().count("<svg") == 2
    assert len(trace.read(saved)) == 80


def test_a_trace_from_a_file_gives_what_the_same_made_up_trace_gave(tune, folder: Path) -> None:
    saved = folder / "trace.csv"
    _, made, _ = tune(*MADE, "--save-trace", str(saved), "--json")

    code, out, err = tune("texts", "--trace", str(saved), "--step-ms", "100,8", "--json")

    assert code == 0, err
    first, second = json.loads(made), json.loads(out)
    for name in ("p95_ms", "device_s", "max_wait_ms"):
        assert second["recommended"][name] == pytest.approx(first["recommended"][name], rel=1e-3)
    assert second["now"]["cost_per_million_jobs"] == pytest.approx(
        1e6 * second["now"]["device_s"] / 80 * 3.6 / 3600
    )


def test_what_is_recommended_is_no_slower_than_now_and_no_dearer(tune) -> None:
    told = json.loads(tune(*MADE, "--json")[1])

    assert told["recommended"]["p95_ms"] <= told["now"]["p95_ms"]
    assert told["recommended"]["device_s"] <= 1.01 * told["now"]["device_s"]


def test_no_size_is_recommended_that_would_refuse_a_job_of_the_trace(tune, folder: Path) -> None:
    saved = folder / "trace.csv"
    saved.write_text(
        "at_s,sequences\n" + "".join(f"{place},{1 + place % 20}\n" for place in range(99))
    )

    told = json.loads(tune("texts", "--trace", str(saved), "--step-ms", "1,50", "--json")[1])

    sizes = {each["max_batch_size"] for points in told["frontier"].values() for each in points}
    assert min(sizes) >= 20


@pytest.mark.parametrize(
    ("step_ms", "times"),
    [
        ("0,5", "0\n0\n0"),
        ("5,0", "0\n1e9"),
        ("0.001,0", "5\n5.0000001\n6"),
        ("1e9,0", "0\n0\n1"),
        ("1e9,1e9", "0\n1e9"),
    ],
)
def test_any_trace_and_any_batches_make_a_report(
    tune, folder: Path, step_ms: str, times: str
) -> None:
    (folder / "trace.csv").write_text(f"at_s\n{times}\n")
    page = folder / "page.html"

    code, out, err = tune(
        "texts", "--trace", str(folder / "trace.csv"), "--step-ms", step_ms, "--html", str(page)
    )

    assert code == 0, err
    assert "nan" not in out + err and "nan" not in page.read_text()


def test_a_p95_that_no_setting_keeps_is_said_and_the_nearest_is_told(tune) -> None:
    code, _, err = tune(*MADE, "--p95-ms", "1")

    assert code == 0
    assert "No setting keeps a p95 of 1 ms; this is nearest." in err


def test_a_file_that_holds_something_else_is_not_written_over(tune, folder: Path) -> None:
    code, _, err = tune(*MADE, "--write", str(folder / "models.toml"))

    assert code == 2
    assert "is there, and not from `gristmill tune`" in err
    assert (folder / "models.toml").read_text() == MODELS
    for _ in range(2):  # our own is
        assert tune(*MADE, "--write", str(folder / "new.toml"))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("gone", *MADE[1:]), 2, "No model gone is configured; there is texts, chat.v1."),
        (MADE[1:], 2, "Say which model: texts, chat.v1."),
        ((*MADE, "--trace", "x.csv"), 2, "Give --trace or --synthetic, and not both."),
        ((*MADE, "--since", "1h"), 2, "--since and --until are of jobs and batches that ran."),
        (("texts", "--since", "1h", "--until", "2h"), 2, "--since is not before --until."),
        ((*MADE[:3], "--step-ms", "100"), 2, "give two numbers, as in 100,8."),
        ((*MADE[:3], "--step-ms", "nan,1"), 2, "milliseconds from 0 to 1e9, and not both 0."),
        ((*MADE[:3], "--step-ms", "0,0"), 2, "milliseconds from 0 to 1e9, and not both 0."),
        ((*MADE, "--jobs", "1"), 2, "Invalid value for '--jobs'"),
        ((*MADE, "--p95-ms", "-1"), 2, "Invalid value for '--p95-ms'"),
        (("texts", "--synthetic", "tide:1", "--step-ms", "1,1"), 1, "tide:1: no such traffic"),
        (
            ("texts", "--trace", "none.csv", "--step-ms", "1,1"),
            1,
            "none.csv cannot be read: No such file",
        ),
        (MADE[:3], 3, "Or say what a batch takes: --step-ms."),
    ],
)
def test_a_wrong_question_is_answered_in_a_sentence(
    tune, arguments: tuple[str, ...], code: int, complaint: str
) -> None:
    told = tune(*arguments)

    assert told[0] == code, told
    assert complaint in told[2]
    assert "Traceback" not in told[2]


# ── engines that are joined between steps ────────────────────────────────────────────────────────


def test_sequences_that_join_share_each_step_by_hand() -> None:
    # given two jobs of ten tokens, the second half way through the first; a step of n takes 10 + n
    jobs = [Arrival(0, output_tokens=10), Arrival(55, output_tokens=10)]

    outcome = replay_joined(jobs, 4, StepCost(10, 1))

    # then five steps alone, five together (12 each), and five alone again
    assert outcome.latencies_ns == [55 + 60, 60 + 55]
    assert outcome.ended_ns == outcome.device_ns == 170


def test_a_job_goes_in_when_there_are_rows_for_all_of_it() -> None:
    jobs = [Arrival(0, 2, output_tokens=1), Arrival(0, 2, output_tokens=1), Arrival(0, 9)]

    outcome = replay_joined(jobs, 3, StepCost(10, 1))

    assert outcome.latencies_ns == [12, 24, 24 + 13]
    assert outcome.sizes == [2, 2, 3]


@given(
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(1, 9), st.integers(0, 99)), min_size=1),
    st.integers(1, 12),
    st.integers(0, 10**6),
)
def test_every_job_that_joins_ends_and_the_device_is_never_busier_than_time_passes(
    found: list[tuple[int, int, int]], rows: int, fixed_ns: int
) -> None:
    jobs = [Arrival(at, size, output_tokens=tokens) for at, size, tokens in sorted(found)]

    outcome = replay_joined(jobs, rows, StepCost(fixed_ns, 1))

    assert len(outcome.latencies_ns) == len(jobs)
    assert min(outcome.latencies_ns) >= 0
    assert max(outcome.sizes) <= rows
    assert outcome.device_ns <= outcome.ended_ns + 1


def test_a_share_of_the_device_tells_how_many_were_inside_and_what_a_step_took() -> None:
    # a job of one sequence, inside for 10 steps of 14 ns with 4 in them
    assert step(1, 10, 140, 35) == (4, 14)
    assert step(2, 20, 140, 70) == (4, 14)
    assert step(1, 0, 140, 35) is None
    assert step(1, 10, 0, 35) is None


def test_rows_are_recommended_where_sequences_join(tune, folder: Path) -> None:
    lines = folder / "new.toml"

    code, out, err = tune(
        "chat.v1", "--synthetic", "steps:1-50/20", "--step-ms", "10,1", "--jobs", "200",
        "--write", str(lines), "--json",
    )  # fmt: skip

    assert code == 0, err
    told = json.loads(out)
    assert told["recommended"]["p95_ms"] <= told["now"]["p95_ms"]
    assert told["adaptive_over_fixed"] == [] and told["frontier"]["adaptive"] == []
    assert "max_batch_size" in lines.read_text() and "batch.policy" not in lines.read_text()
    assert "max_wait_ms" not in lines.read_text()  # nothing waits there


def points(*found: tuple[float, float]) -> list[Point]:
    return [
        Point(Setting(1, place), 1, 1, 1, 1, p95, p95, p95, p95, device, 1)
        for place, (p95, device) in enumerate(found)
    ]


def test_a_frontier_leaves_out_what_is_slower_and_no_cheaper() -> None:
    found = points((1, 9), (2, 9), (2, 8), (3, 8.5), (4, 7))

    assert [(p.p95_ms, p.device_s) for p in frontier(found)] == [(1, 9), (2, 8), (4, 7)]
