"""The events of a response: numbered, and the same however its text came."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from hypothesis import given
from hypothesis import strategies as st
from openai._models import construct_type_unchecked
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from app.jobs import FinishReason, JobState, Usage
from app.requests.answers import Said
from app.requests.calls import Call
from app.requests.response_answer import answered, ended, hex_of, output_of
from app.requests.response_events import Event, Narration, pieces
from tests.unit.test_responses import SAID, shell

EVENT: Final[TypeAdapter[Any]] = TypeAdapter(ResponseStreamEvent)
FINAL: Final = st.sampled_from(list(JobState)[2:])


def response(found: Said, state: JobState = JobState.COMPLETED) -> dict[str, Any]:
    calls = [f"a1b2c3d4{place}" for place in range(len(found.calls))]
    reason = FinishReason.STOP if state is JobState.COMPLETED else FinishReason.CANCELLED
    return answered(shell(), found, calls, reason=reason, counted=Usage(3, 2), state=state)


def replayed(told: dict[str, Any]) -> list[Event]:
    """The events of a row."""
    narration = Narration(shell())
    return [*narration.queued(), *narration.end(told)]


def so_far(told: dict[str, Any], content: str, reasoning: str | None) -> list[dict[str, Any]]:
    return output_of(Said(content, reasoning), [], hex_of(told)) if content or reasoning else []


def checked(events: Iterable[Event]) -> list[Event]:
    """Valid, numbered from 0, and read by OpenAI's own reader."""
    found = list(events)
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=[], text_format=omit)
    for event in found:
        EVENT.validate_python(event, strict=True)
        read = construct_type_unchecked(value=event, type_=ResponseStreamEvent)  # type: ignore[arg-type]
        state.handle_event(read)
    return found


def test_the_events_of_a_short_answer_are_those_of_openai() -> None:
    told = checked(replayed(response(Said("A mill."))))

    assert [each["type"].removeprefix("response.") for each in told] == [
        "created",
        "queued",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [each["delta"] for each in told if "delta" in each] == ["A", " mill", "."]


@given(SAID, FINAL)
def test_events_of_any_response_say_all_that_it_says(found: Said, state: JobState) -> None:
    whole = response(found, state)

    told = checked(replayed(whole))

    assert told[-1]["response"] == whole
    items = [each["item"] for each in told if each["type"] == "response.output_item.done"]
    assert items == whole["output"]
    for item in items:
        deltas = "".join(
            each["delta"] for each in told if "delta" in each and each["item_id"] == item["id"]
        )
        assert deltas == item.get("arguments", "".join(p["text"] for p in item.get("content", ())))


@given(SAID, FINAL, st.data())
def test_events_are_the_same_in_whatever_portions_the_text_came(
    found: Said, state: JobState, data: st.DataObject
) -> None:
    # given an answer that comes piece by piece, its thought first
    whole = response(found, state)
    narration = Narration(shell())
    told = [*narration.queued()]
    thought, content = found.reasoning, found.content
    ends = st.lists(st.integers(0, len(thought or "") + len(content)), max_size=5)
    for end in sorted(data.draw(ends)):
        if data.draw(st.booleans()):
            told += narration.started()
        shown = None if thought is None else thought[:end]
        rest = content[: max(0, end - len(thought or ""))]
        told += narration.so_far(so_far(whole, rest, shown))
        # then what was told is a beginning of what the row will tell
        assert told == replayed(whole)[: len(told)]

    # and so is all of it
    told += narration.end(whole)
    assert told == replayed(whole)


@given(SAID, SAID, FINAL)
def test_what_turns_out_otherwise_is_ended_as_incomplete_and_told_whole(
    before: Said, after: Said, state: JobState
) -> None:
    # given an answer that was told, and whose worker was lost
    narration = Narration(shell())
    told = [*narration.queued()]
    told += narration.so_far(so_far(shell(), before.content, before.reasoning))

    # when another one comes of it, or none
    whole = ended(shell(), state) if after == Said("") else response(after, state)
    told += narration.so_far(whole["output"])
    told += narration.end(whole)

    # then the events are still in order, all that was begun is ended, and the last one is true
    events = checked(told)
    kinds = [each["type"] for each in events]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done")
    assert events[-1]["response"] == whole


@given(st.text(max_size=60), st.data())
def test_where_a_text_is_cut_follows_from_the_text_alone(text: str, data: st.DataObject) -> None:
    cut = list(pieces(text, 0, is_whole=True))
    end = data.draw(st.integers(0, len(text)))

    known = list(pieces(text[:end], 0, is_whole=False))

    assert "".join(cut) == text
    assert known == cut[: len(known)]
    assert len("".join(known)) >= end - 33


def test_calls_are_told_with_their_arguments() -> None:
    whole = response(Said("", calls=[Call("grind", '{"fine": true}')]))

    told = checked(replayed(whole))

    [added] = [each for each in told if each["type"] == "response.output_item.added"]
    [done] = [each for each in told if each["type"] == "response.function_call_arguments.done"]
    assert added["item"]["arguments"] == "" and added["item"]["status"] == "in_progress"
    assert (done["name"], done["arguments"]) == ("grind", '{"fine": true}')
