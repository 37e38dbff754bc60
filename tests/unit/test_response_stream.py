"""A response's events as its job's tokens come, and the same again after a worker was lost."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Coroutine
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Final, cast
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.live.events import Begun, Ended, NewTokens, Queued, Silence
from app.api.openai import response_stream
from app.api.openai.response_rows import Row
from app.api.openai.response_stream import Telling
from app.api.schemas import Job as Told
from app.broker.events import EventId, Tokens
from app.config.settings import ModelSettings
from app.engines.base import Generation
from app.engines.checkpoint.card import NO_CARD
from app.engines.text.tokenizer import FileTokenizer
from app.jobs import FinishReason, JobState, SamplingParams
from app.requests import replies
from app.requests.bodies import FORMAT, Request
from app.requests.prepare import Prepared, encode
from app.requests.response_events import Event, Narration
from app.requests.saying import Saying
from app.store.asked import Asked
from app.worker.work import Job
from tests.unit import chat_templates
from tests.unit.test_responses import FUNCTION, asked, sent

ID: Final = UUID("0199e0a4-f4a9-7c53-a7b3-a9f5d8f6d2ce")
NOW: Final = dt.datetime(2026, 11, 27, tzinfo=dt.UTC)
CALL: Final = '<tool_call>\n{"name": "grind", "arguments": {"fine": true}}\n</tool_call>'
ANSWERS: Final = (
    "I will grind it.",
    "<think>\nGrain, coarse.\n</think>\n\nIt is flour now.",
    f"<think>Hm.</think>I will.{CALL}",
    f"{CALL}\n{CALL}",
    "",
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    return chat_templates.tokenizer_of(tmp_path_factory.mktemp("qwen"), chat_templates.QWEN)


class Answer:
    """An answer of the model, and the job that has it."""

    def __init__(self, tokenizer: FileTokenizer, text: str) -> None:
        self.request: Request = asked(tools=[FUNCTION])
        self.prompts = encode(self.request, tokenizer)
        self.tokenizer = tokenizer
        self.ids = tokenizer._file.encode(text, add_special_tokens=False).ids
        self.response = replies.body(
            self.request,
            [Generation(1, FinishReason.STOP, self.ids, tokenizer.decode(self.ids))],
            job_id=str(ID),
            model="m",
            created=int(NOW.timestamp()),
            tokenizer=tokenizer,
            prompts=self.prompts,
        )

    def telling(self) -> Telling:
        saying = Saying(sent(self.request).meant, self.tokenizer, self.prompts[0])
        return Telling(self._row(None), saying)

    def _row(self, response: dict[str, Any] | None) -> Row:
        job = SimpleNamespace(
            id=ID,
            model="m",
            created_at=NOW,
            finished_at=NOW,
            metadata={},
            state=JobState.COMPLETED,
            response=response,
            error=None,
        )
        asked_for = Asked(self.request.url, self.request.raw, FORMAT)
        return Row(cast(Told, job), asked_for, sent(self.request))

    @property
    def ended(self) -> Ended:
        job = Told.model_construct(**vars(self._row(self.response).job))
        return Ended(cast(Any, SimpleNamespace(job=job)), True)

    def tokens(self, attempt: int, start: int, stop: int) -> NewTokens:
        """Those from one place to another, as an engine tells of them."""
        ids = self.ids[start:stop]
        before, after = (self.tokenizer.decode(self.ids[:end]) for end in (start, stop))
        text = after[len(before) :]
        return NewTokens(EventId(attempt, 1), 0, text, Tokens(0, text, tuple(ids)))

    @property
    def replayed(self) -> list[Event]:
        telling = self.telling()
        return [*telling.queued(), *cast(Any, telling.of(self.ended))]


def begun(attempt: int) -> Begun:
    return Begun(EventId(attempt, 0), uuid4(), 1)


@given(st.sampled_from(ANSWERS), st.data())
def test_events_go_on_where_they_were_when_a_worker_is_lost(
    qwen: FileTokenizer, text: str, data: st.DataObject
) -> None:
    # given an answer whose tokens come in any portions, again and again from the first
    answer = Answer(qwen, text)
    telling = answer.telling()
    told: list[Any] = [*telling.queued(), *telling.of(Queued(1, None))]
    size = len(answer.ids)
    for attempt in range(1, data.draw(st.integers(1, 3)) + 1):
        told += telling.of(begun(attempt))
        places = sorted({0, *data.draw(st.lists(st.integers(0, size), max_size=6))})
        for start, stop in pairwise(places):
            told += telling.of(answer.tokens(attempt, start, stop))
            # then what was told is a beginning of what the row will tell
            assert told == answer.replayed[: len(told)]

    told += telling.of(answer.ended)

    assert told == answer.replayed


def test_another_text_after_a_loss_is_told_at_the_end_alone(qwen: FileTokenizer) -> None:
    before, after = Answer(qwen, "I will grind it."), Answer(qwen, "I shall not.")
    telling = before.telling()
    told: list[Any] = [*telling.queued(), *telling.of(begun(1))]
    told += telling.of(before.tokens(1, 0, len(before.ids)))

    told += telling.of(begun(2))
    told += telling.of(after.tokens(2, 0, len(after.ids)))
    told += telling.of(after.ended)

    *_, done, last = told
    assert (done["type"], done["item"]["status"]) == ("response.output_item.done", "incomplete")
    assert last["response"]["output"][0]["content"][0]["text"] == "I shall not."
    assert [each["sequence_number"] for each in told] == list(range(len(told)))


def test_who_has_gone_before_the_first_word_is_seen_to_have_gone(
    qwen: FileTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a listener that hangs up while its answer is made
    async def happening(*_: object) -> AsyncIterator[Silence]:
        yield Silence()

    async def nobody(*_: object) -> None: ...

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def unread(*_: object) -> None:
        await asyncio.Event().wait()

    async def close(has_ended: bool) -> None:
        closed.append(has_ended)

    monkeypatch.setattr(response_stream.events, "events", happening)
    closed: list[bool] = []

    async def answer() -> None:
        behind: list[Coroutine[Any, Any, object]] = []
        here = SimpleNamespace(work=SimpleNamespace(run=nobody), later=behind.append)
        row = Answer(qwen, ANSWERS[0])._row(None)
        told = await response_stream.stream(cast(Any, here), "default", row, None, close)
        await told({"type": "http", "asgi": {}}, cast(Any, gone), cast(Any, unread))
        for each in behind:
            await each

    asyncio.run(answer())

    # then its job is, too, though nothing was told
    assert closed == [False]


def test_without_the_models_files_all_is_told_at_the_end(qwen: FileTokenizer) -> None:
    answer = Answer(qwen, ANSWERS[1])
    telling = Telling(answer._row(None), None)

    told: list[Any] = [*telling.queued(), *telling.of(begun(1))]
    told += telling.of(answer.tokens(1, 0, 5))
    assert len(told) == 3

    assert [*told, *telling.of(answer.ended)] == answer.replayed


def test_one_that_its_model_would_not_take_now_is_told_of_the_row(qwen: FileTokenizer) -> None:
    # given a model that takes fewer tokens than when the response was made
    settings = ModelSettings.model_construct(engine="stub", max_batch_size=0)
    models = {"m": SimpleNamespace(tokenizer=qwen, settings=settings, card=NO_CARD)}
    here = SimpleNamespace(submitter=SimpleNamespace(models=models))

    assert response_stream._listener(cast(Any, here), Answer(qwen, "")._row(None)) is None


def test_the_narration_of_a_row_is_the_telling_of_its_end(qwen: FileTokenizer) -> None:
    answer = Answer(qwen, ANSWERS[2])

    narration = Narration(answer.replayed[0]["response"])

    assert [*narration.queued(), *narration.end(answer.replayed[-1]["response"])] == answer.replayed


@pytest.mark.parametrize(("is_told", "given"), [(True, None), (True, 7), (False, None)])
def test_what_is_told_as_it_comes_is_drawn_the_same_whenever_it_runs(
    is_told: bool, given: int | None
) -> None:
    def drawn() -> list[int | None]:
        job = Job(
            ticket=cast(Any, SimpleNamespace(job_id=ID)),
            model="m",
            request=cast(Any, SimpleNamespace(num_sequences=2, num_answers=2, adapter="")),
            prepared=Prepared(((1, 2),), 8, SamplingParams(8, seed=given)),
            priority=0,
            deadline=None,
            tenant="default",
            losses=0,
            arrived_ns=0,
            registered_ns=0,
            stream_events=is_told,
        )
        return [each.params.seed for each in job.sequences(0) if each.params]

    first, second = drawn()

    assert drawn() == [first, second]
    assert (first is None) == (not is_told)
    assert first is None or (first != second and given in (None, first))
