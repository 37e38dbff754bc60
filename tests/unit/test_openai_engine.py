"""The engine `openai` against real HTTP, spoken by a server that misbehaves as it is told."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.config.settings import ModelSettings
from app.engines import registry
from app.engines.base import Generation, Sequence
from app.engines.openai import balance, engine, request, tokenizer
from app.engines.openai.engine import OpenAiEngine
from app.engines.openai.options import Options
from app.engines.openai.tokenizer import TextTokenizer, unpacked
from app.engines.text.chat_template import Chat
from app.errors import ConfigError, RequestError
from app.jobs import FinishReason, SamplingParams
from tests.fake_upstream import KEY, Does, FakeUpstream
from tests.unit.full_params import FULL
from tests.waiting import eventually

MOST = 16


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(balance, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(engine, "DENIED_PAUSE_S", 0.05)


def model(*upstreams: FakeUpstream, source: str = "tokens", **options: Any) -> ModelSettings:
    servers = [{"url": each.url} for each in upstreams]
    return ModelSettings(
        source=source,
        kind="generate",
        engine="openai",
        max_batch_size=MOST,
        context_tokens=4096,
        options={"model": "theirs", "upstreams": servers, "server": "vllm"} | options,
    )


@contextmanager
def running(*upstreams: FakeUpstream, **given: Any) -> Iterator[OpenAiEngine]:
    made = OpenAiEngine(Path(), model(*upstreams, **given), "cpu", 0, lambda: None)
    try:
        yield made
    finally:
        made.close()


def sequence(id_: int, prompt: tuple[int, ...] = (5, 6, 7), **params: Any) -> Sequence:
    return Sequence(id_, prompt, SamplingParams(**{"max_tokens": 20} | params))


def run(engine: OpenAiEngine) -> dict[int, Generation]:
    answers: dict[int, Generation] = {}

    def step() -> bool:
        answers.update({each.sequence_id: each for each in engine.step()})
        return not engine.has_work

    eventually(step, 60)
    return answers


def ask(engine: OpenAiEngine, *sequences: Sequence) -> dict[int, Generation]:
    engine.admit("batch", sequences)
    return run(engine)


def test_each_sequence_gets_the_answer_to_its_own_prompt_with_the_upstreams_usage() -> None:
    with FakeUpstream() as upstream, running(upstream) as inside:
        answers = ask(inside, *(sequence(n, tuple(range(n, 2 * n + 1))) for n in range(1, 40)))

        for n in range(1, 40):
            told = [int(token) for token in answers[n].text.split()]
            assert told == list(reversed(range(n, 2 * n + 1)))[:20]
            assert answers[n].output_tokens == len(told)
            assert (answers[n].input_tokens, answers[n].cached_tokens) == (n + 1, 1)
            assert answers[n].finish_reason is FinishReason.STOP
            assert answers[n].device_ns == 0
            assert answers[n].started_ns <= answers[n].first_token_ns <= answers[n].finished_ns
        [stats] = inside.take_stats()
        assert (stats.rows, stats.device_ns) == (39, 0)


def test_prompts_go_out_as_the_token_ids_that_were_counted_here() -> None:
    with FakeUpstream() as upstream, running(upstream) as inside:
        ask(inside, sequence(1, (9, 8), temperature=0.5, top_k=4, stop=("x",)))

    [body] = upstream.seen.bodies
    assert upstream.seen.paths == ["/v1/completions"]
    assert body["prompt"] == [9, 8]
    assert (body["model"], body["temperature"], body["top_k"]) == ("theirs", 0.5, 4)
    assert (body["stop"], body["stream"]) == (["x"], True)


def test_an_answer_that_comes_whole_is_taken_as_well() -> None:
    with (
        FakeUpstream(lambda number, body: Does(whole=True, end="length")) as upstream,
        running(upstream) as inside,
    ):
        answers = ask(inside, sequence(1))

    assert (answers[1].text, answers[1].finish_reason) == ("7 6 5 ", FinishReason.LENGTH)


HALF = b'data: {"choices": [{"text": "half", "finish_reason": null}]}\n\ndata: [DONE]\n\n'
ODD_COUNT = b'{"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"prompt_tokens": -1}}'
FAULTS = st.sampled_from(
    [
        Does(429),
        Does(429, ("Retry-After: 0.01",)),
        Does(429, ("Retry-After: soon",)),
        Does(503),
        Does(529),
        Does(500),
        Does(502),
        Does(404),
        Does(408),
        Does(cut_after=0),
        Does(cut_after=2),
        Does(raw=b""),
        Does(raw=b"\x00\xff\xfe no protocol\n\n\n"),
        Does(raw=b"data: {\n\n"),
        Does(raw=b"data: []\n\ndata: 7\n\ndata: null\n\n"),
        Does(raw=b'data: {"choices": [{"text": 3}]}\n\n'),
        Does(raw=b'data: {"choices": {"text": "a"}}\n\n'),
        Does(raw=HALF),
        Does(raw=b'data: {"error": {"message": "boom"}}\n\n'),
        Does(raw=b'{"choices": [', content_type="application/json"),
        Does(raw=b"[" * 100_000, content_type="application/json"),
        Does(raw=ODD_COUNT, content_type="application/json"),
        Does(raw=b"<html>busy</html>", content_type="text/html"),
    ]
)  # fmt: skip


@hypothesis_settings(max_examples=10)
@given(
    st.lists(st.tuples(st.integers(0, 60), FAULTS), max_size=15),
    st.integers(1, 8),
    st.integers(1, 3),
)
def test_whatever_an_upstream_does_for_a_while_every_sequence_has_one_answer_and_its_own(
    faults: list[tuple[int, Does]], sequences: int, servers: int
) -> None:
    at = dict(faults)
    count = iter(range(10**6))
    lock = threading.Lock()

    def plan(number: int, body: dict[str, Any]) -> Does:
        with lock:
            return at.get(next(count), Does())

    upstreams = [FakeUpstream(plan) for _ in range(servers)]
    for each in upstreams:
        each.__enter__()
    try:
        with running(*upstreams) as inside:
            answers = ask(inside, *(sequence(n, (n, n + 1)) for n in range(1, sequences + 1)))
    finally:
        for each in upstreams:
            each.__exit__()

    # Alone with one fault after the other a sequence may fail, but for no other reason.
    assert answers.keys() == set(range(1, sequences + 1))
    for n, answer in answers.items():
        if answer.finish_reason is FinishReason.ERROR:
            assert answer.error_code == "upstream_failed"
            assert len(faults) >= engine.LOSSES_ALONE
        else:
            assert (answer.text, answer.output_tokens) == (f"{n + 1} {n} ", 2)


def test_an_overloaded_upstream_is_waited_for_and_sent_no_more_than_it_bears() -> None:
    bears = 3

    def plan(number: int, body: dict[str, Any]) -> Does:
        # What was sent and is not answered: how many of them run here at once is chance.
        return Does() if inside._servers[0].load.inside <= bears else Does(429)

    upstream = FakeUpstream(plan)
    with upstream, running(upstream) as inside:
        answers = ask(inside, *(sequence(n) for n in range(120)))
        limit = inside._servers[0].load.limit

    assert {each.finish_reason for each in answers.values()} == {FinishReason.STOP}
    assert limit <= 2 * bears


def test_a_request_that_the_upstream_refuses_fails_alone_and_is_not_quoted() -> None:
    def plan(number: int, body: dict[str, Any]) -> Does:
        return Does(400) if 66 in body["prompt"] else Does()

    with FakeUpstream(plan) as upstream, running(upstream) as inside:
        answers = ask(inside, sequence(1), sequence(2, (66,)), sequence(3))

    assert answers[2].error_code == "invalid_request"
    assert answers[2].error_message == "The upstream refused the request (400, some_code)."
    assert answers[1].text == answers[3].text == "7 6 5 "
    assert len(upstream.seen.bodies) == 3


def test_a_prompt_that_its_upstream_dies_of_fails_and_its_mates_do_not() -> None:
    # given a server that resets all connections whenever a certain prompt comes
    def plan(number: int, body: dict[str, Any]) -> Does:
        if 66 not in body["prompt"]:
            return Does()
        threading.Thread(target=revive).start()
        return Does(hangs=True)

    def revive() -> None:
        upstream.die()
        upstream.listen()

    upstream = FakeUpstream(plan)
    with upstream, running(upstream) as inside:
        answers = ask(inside, sequence(0, (66,)), *(sequence(n, (n,) * 9) for n in range(1, 30)))

    assert answers.pop(0).error_code == "upstream_failed"
    assert {each.finish_reason for each in answers.values()} == {FinishReason.STOP}


def test_a_killed_upstream_is_waited_for_and_nothing_is_lost() -> None:
    with FakeUpstream() as upstream, running(upstream) as inside:
        inside.admit("batch", [sequence(n, (n, 1)) for n in range(200)])
        answers: dict[int, Generation] = {}
        while len(answers) < 50:
            answers.update({each.sequence_id: each for each in inside.step()})

        upstream.die()
        for _ in range(20):
            answers.update({each.sequence_id: each for each in inside.step()})
        upstream.listen()
        answers.update(run(inside))

    assert answers.keys() == set(range(200))
    assert all(each.text == f"1 {n} " for n, each in answers.items())


def test_of_several_upstreams_those_that_are_well_do_the_work() -> None:
    with FakeUpstream() as well, FakeUpstream() as dead:
        dead.die()
        with running(dead, well) as inside:
            answers = ask(inside, *(sequence(n) for n in range(40)))

    assert {each.finish_reason for each in answers.values()} == {FinishReason.STOP}
    assert len(well.seen.bodies) == 40


def test_a_cancelled_sequence_hangs_up_and_comes_back_with_what_it_has() -> None:
    def plan(number: int, body: dict[str, Any]) -> Does:
        return Does(hangs=66 in body["prompt"])

    with FakeUpstream(plan) as upstream, running(upstream) as inside:
        inside.cancel(3)  # before it comes, as it may overtake it
        inside.admit("batch", [sequence(1), sequence(2, (66,)), sequence(3, (66,))])
        eventually(lambda: upstream.seen.inside == 1 and len(upstream.seen.bodies) == 2)
        inside.cancel(2)
        answers = run(inside)
        eventually(lambda: upstream.seen.hung_up == 1)

    assert answers[1].finish_reason is FinishReason.STOP
    assert {answers[n].finish_reason for n in (2, 3)} == {FinishReason.CANCELLED}
    assert inside._servers[0].load.inside == 0


@hypothesis_settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), max_size=30))
def test_whoever_is_cancelled_whenever_all_come_back_and_no_place_stays_taken(
    cancels: list[tuple[int, int]],
) -> None:
    def plan(number: int, body: dict[str, Any]) -> Does:
        return Does(429) if upstream.seen.inside > 3 else Does(hangs=body["prompt"][0] % 5 == 0)

    upstream = FakeUpstream(plan)
    with upstream, running(upstream, timeout_s=0.1) as inside:
        inside.admit("batch", [sequence(n, (n, 1)) for n in range(40)])
        answers: dict[int, Generation] = {}
        for step in range(31):
            for at, id_ in cancels:
                if at == step:
                    inside.cancel(id_)
            answers.update({each.sequence_id: each for each in inside.step()})
        for n in range(0, 40, 5):
            inside.cancel(n)
        answers.update(run(inside))

        assert answers.keys() == set(range(40))
        cancelled = {n for n, each in answers.items() if each.finish_reason.value == "cancelled"}
        assert cancelled <= {id_ for _, id_ in cancels} | set(range(0, 40, 5))
        eventually(lambda: inside._servers[0].load.inside == 0 and not inside._waiting)


def test_an_answer_without_end_and_one_of_half_characters_are_no_trouble() -> None:
    piece = b'data: {"choices": [{"text": "x", "finish_reason": null}]}\n\n'
    halves = b'{"choices": [{"text": "\\ud83d\\ude00 \\ud83d \\u0000", "finish_reason": "stop"}]}'
    endless = Does(raw=piece * 1_000)
    plans = [endless, Does(raw=halves, content_type="application/json")]
    with (
        FakeUpstream(lambda number, body: plans[min(number, 1)]) as upstream,
        running(upstream) as inside,
    ):
        answers = ask(inside, sequence(1))

    assert len(upstream.seen.bodies) == 2
    assert answers[1].text == "\U0001f600 \ufffd \0"


def test_an_upstream_that_goes_silent_is_asked_again() -> None:
    with (
        FakeUpstream(lambda number, body: Does(hangs=number == 0)) as upstream,
        running(upstream, timeout_s=0.3) as inside,
    ):
        answers = ask(inside, sequence(1))

    assert answers[1].finish_reason is FinishReason.STOP
    assert len(upstream.seen.bodies) == 2


def test_the_key_goes_to_the_upstream_and_into_no_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # given keys from the environment and from a file, and an upstream that makes trouble
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("UPSTREAM_KEY", KEY)
    (tmp_path / "key").write_text(f"{KEY}\n")
    fails_once = {0: Does(cut_after=1), 1: Does(500), 2: Does(429)}
    for where in ({"key_env": "UPSTREAM_KEY"}, {"key_file": str(tmp_path / "key")}):
        with FakeUpstream(lambda number, body: fails_once.get(number, Does()), key=KEY) as upstream:
            server = [{"url": upstream.url} | where]
            with running(upstreams=server) as inside:
                # No port has as many digits as these tokens.
                answers = ask(inside, sequence(1, (654321, 123456)))

        assert answers[1].finish_reason is FinishReason.STOP
        assert upstream.seen.keys == {KEY}
    assert KEY not in caplog.text and "654321" not in caplog.text
    assert "upstream" in caplog.text.lower()


def test_a_key_that_is_not_taken_is_said_at_start() -> None:
    with (
        FakeUpstream(key=KEY) as upstream,
        pytest.raises(
            ConfigError, match=r"127.0.0.1 does not take the key that it is sent \(401\)"
        ),
        running(upstream),
    ):
        pass


def test_what_an_answer_says_that_it_costs_comes_back_with_it() -> None:
    with (
        FakeUpstream(lambda number, body: Does(cost=0.00025)) as upstream,
        running(upstream, charges=True) as charging,
        running(upstream) as other,
    ):
        charge = ask(charging, sequence(1))[1].charge
        none = ask(other, sequence(1))[1].charge

    assert (str(charge), none) == ("0.00025", None)


def test_odd_ends_are_errors_by_name() -> None:
    with (
        FakeUpstream(lambda number, body: Does(end="content_filter")) as upstream,
        running(upstream) as inside,
    ):
        answers = ask(inside, sequence(1))

    assert answers[1].error_code == "upstream_ended"
    assert "content_filter" in str(answers[1].error_message)


def test_embeddings_are_asked_for_by_token_ids() -> None:
    with FakeUpstream() as upstream, running(upstream) as inside:
        answers = ask(inside, Sequence(1, (5, 6, 7)))

    assert answers[1].embedding == [3.0, 0.5]
    assert (answers[1].input_tokens, answers[1].output_tokens) == (3, 0)


# ── texts and chats, where no tokenizer is here ─────────────────────────────────────────────────

TEXT = TextTokenizer(
    ModelSettings(source="upstream", kind="generate", engine="openai", context_tokens=99)
)


@given(st.text())
def test_a_text_survives_being_packed_into_tokens(text: str) -> None:
    packed = TEXT.encode_text(text)

    assert unpacked(packed) == text
    assert TEXT.decode(packed) == text
    assert all(0 <= token < TEXT.vocab_size for token in packed)
    assert len(packed) == 1 + -(-len(text.encode()) // tokenizer.BYTES)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1))
def test_token_ids_that_are_no_text_are_refused_or_are_one(token_ids: list[int]) -> None:
    try:
        unpacked(token_ids)
    except RequestError:
        pass


def test_a_chat_goes_out_as_messages_and_a_text_as_text() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say mill"}]
    with (
        FakeUpstream() as upstream,
        running(upstream, source="upstream", server="openai") as inside,
    ):
        answers = ask(
            inside,
            sequence(1, TEXT.encode_chat(Chat(messages))),
            sequence(2, TEXT.encode_text("Say wheel")),
            sequence(3, (5, 6, 7)),
        )

    assert (answers[1].text, answers[2].text) == ("mill", "wheel")
    assert (answers[1].input_tokens, answers[1].output_tokens) == (2, 1)
    assert answers[3].error_code == "invalid_request"
    assert sorted(upstream.seen.paths) == ["/v1/chat/completions", "/v1/completions"]
    assert messages in [body.get("messages") for body in upstream.seen.bodies]


# ── what is passed on ───────────────────────────────────────────────────────────────────────────

FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("server", [*request.NAMES])
@pytest.mark.parametrize("as_text", [False, True])
def test_every_field_of_the_sampling_parameters_is_sent_or_refused_by_name(
    server: str, as_text: bool
) -> None:
    options = Options(model="m", url="http://h/v1", server=server)
    plain = SamplingParams(max_tokens=1)
    prompt = TEXT.encode_text("x") if as_text else (5,)

    def body(params: SamplingParams) -> str:
        made = request.request_of(Sequence(1, prompt, params), options, as_text=as_text)
        return json.dumps(made)

    refused: list[str | None] = []
    passed: list[str] = []
    for field in dataclasses.fields(SamplingParams):
        value = getattr(FULL, field.name)
        assert value != getattr(plain, field.name), f"{field.name} is not tried"
        try:
            assert body(dataclasses.replace(plain, **{field.name: value})) != body(plain)
        except RequestError as error:
            refused.append(error.param)
        else:
            passed.append(field.name)
    names = {"response_format" if name == "grammar" else name for name in FIELDS - {*passed}}
    assert {*refused} == names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "model: Field required"),
        ({"model": "m"}, "give url or upstreams"),
        ({"model": "m", "url": "http://a/v1", "upstreams": [{"url": "http://b/v1"}]}, "url or ups"),
        ({"model": "m", "upstreams": [{"url": "ftp://b"}]}, "upstreams.0.url"),
        ({"model": "m", "upstreams": [{"url": "http://b", "weight": 0}]}, "upstreams.0.weight"),
        ({"model": "m", "url": "http://a/v1", "key": KEY}, "no option key"),
        ({"model": "m", "url": "http://a/v1", "timeout_s": -1}, "timeout_s"),
        ({"model": "m", "url": "http://a/v1", "server": "mine"}, "server"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name_and_not_quoted(
    options: dict[str, Any], said: str
) -> None:
    wrong = ModelSettings(source="/tmp", kind="generate", engine="openai", options=options)

    with pytest.raises(ConfigError, match=said) as raised:
        registry.check(wrong)

    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"key_env": "NO_SUCH_KEY"}, "no key in environment variable NO_SUCH_KEY"),
        ({"key_file": "/no/such"}, "/no/such cannot be read"),
    ],
)
def test_a_key_that_is_not_there_is_said_at_the_workers_start(
    where: dict[str, str], said: str
) -> None:
    with (
        FakeUpstream() as upstream,
        pytest.raises(ConfigError, match=said),
        running(upstreams=[{"url": upstream.url} | where]),
    ):
        pass


def test_without_files_the_context_has_to_be_said() -> None:
    wrong = ModelSettings(
        source="upstream",
        kind="generate",
        engine="openai",
        options={"model": "m", "url": "http://a/v1"},
    )

    with pytest.raises(ConfigError, match="context_tokens has to be set"):
        registry.check(wrong)
