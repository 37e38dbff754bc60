"""OpenAI's Responses API: what its requests ask of a model, and what its answers look like."""

from __future__ import annotations

import json
from contextlib import suppress
from copy import copy
from typing import Any, Final
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response

from app.engines.base import Generation, TokenLogprob
from app.engines.text.tokenizer import FileTokenizer
from app.errors import RequestError
from app.jobs import FinishReason, JobState, Usage
from app.requests import replies
from app.requests.answers import Said
from app.requests.bodies import FORMAT, Request, Url, parse, parse_stored
from app.requests.calls import Call
from app.requests.prepare import prepare
from app.requests.response import ResponsesBody
from app.requests.response_answer import answered, ended, response_shell
from tests.unit import chat_templates, tiny_tokenizers

ID: Final = UUID("0199e0a4-f4a9-7c53-a7b3-a9f5d8f6d2ce")
FUNCTION: Final = {"type": "function", "name": "grind", "parameters": {"type": "object"}}
NEVER_NULL: Final = {
    "temperature": 1.0,
    "top_p": 1.0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "top_logprobs": 0,
    "tool_choice": "auto",
    "truncation": "disabled",
    "background": False,
    "service_tier": "default",
    "tools": [],
    "parallel_tool_calls": True,
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
}


def asked(**body: Any) -> Request:
    return parse({"input": "Grind it."} | body, Url.RESPONSES)


def messages(**body: Any) -> list[dict[str, Any]]:
    """What a chat template is given."""
    [prompt] = asked(**body).prompts
    return [dict(each) for each in prompt.chat.messages]  # type: ignore[union-attr]


def sent(request: Request) -> ResponsesBody:
    assert isinstance(request.sent, ResponsesBody)
    return request.sent


def shell(**body: Any) -> dict[str, Any]:
    return response_shell(
        sent(asked(**body)), job_id=ID, model="m", created_at=7, metadata={"order": "17"}
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    return chat_templates.tokenizer_of(tmp_path_factory.mktemp("qwen"), chat_templates.QWEN)


def response(
    tokenizer: FileTokenizer,
    answer: str,
    reason: FinishReason = FinishReason.STOP,
    logprobs: list[TokenLogprob] | None = None,
    **body: Any,
) -> dict[str, Any]:
    """The response that an answer of this text becomes."""
    request = asked(**body)
    made = prepare(request, tokenizer, tiny_tokenizers.SETTINGS)
    ids = tokenizer._file.encode(answer, add_special_tokens=False).ids
    generation = Generation(3, reason, ids, tokenizer.decode(ids), logprobs)
    told = replies.body(
        request, [generation], job_id=str(ID), model="m", created=7, tokenizer=tokenizer,
        prompts=made.prompts,
    )  # fmt: skip
    Response.model_validate(told, strict=True)
    return told


def test_a_text_is_a_message_of_the_user_and_instructions_go_before() -> None:
    assert messages(instructions="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grind it."},
    ]


def test_what_an_assistant_thinks_says_and_calls_in_a_row_is_one_turn() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Grind"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
            {"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": "I will.", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "call_id": "a1", "name": "grind", "arguments": '{"fine": true}'},
        {"type": "function_call_output", "call_id": "a1", "output": "flour"},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "And sieved."},
    ]  # fmt: skip
    call = {"name": "grind", "arguments": {"fine": True}}

    assert messages(input=items) == [
        {"role": "user", "content": "Grind"},
        {
            "role": "assistant",
            "content": "I will.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "a1", "type": "function", "function": call}],
        },
        {"role": "tool", "content": "flour", "name": "grind", "tool_call_id": "a1"},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "And sieved."},
    ]


def test_everything_else_means_what_it_means_in_a_chat() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    chat = parse(
        {
            "messages": [{"role": "user", "content": "Grind it."}],
            "max_completion_tokens": 9,
            "temperature": 0.5,
            "seed": 3,
            "stop": ["x"],
            "tools": [{"type": "function", "function": {"name": "grind"}}],
            "tool_choice": {"type": "function", "function": {"name": "grind"}},
            "parallel_tool_calls": False,
            "reasoning_effort": "low",
            "logprobs": True,
            "top_logprobs": 2,
        }
    )
    same = asked(
        max_output_tokens=9,
        temperature=0.5,
        seed=3,
        stop=["x"],
        tools=[{"type": "function", "name": "grind"}],
        tool_choice={"type": "function", "name": "grind"},
        parallel_tool_calls=False,
        reasoning={"effort": "low"},
        top_logprobs=2,
    )

    assert same.prompts == chat.prompts
    assert same.body.offer == chat.body.offer  # type: ignore[attr-defined]
    assert same.body.sampling(9, (), None) == chat.body.sampling(9, (), None)  # type: ignore[attr-defined]
    form = {"type": "json_schema", "name": "a", "schema": schema}
    grammar = asked(text={"format": form}).body.grammar  # type: ignore[attr-defined]
    assert json.loads(grammar.text) == schema


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": [7]}, "input.0"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None),
        ({"input": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]}, None),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "x"}]},
         "input.0.arguments"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "ä", "schema": {}}}},
         "text.format.name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools"),
        ({"tool_choice": {"type": "function", "name": "sieve"}, "tools": [FUNCTION]},
         "tool_choice.name"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background_options": {"completion_window": "2h"}}, "background_options"),
        ({"background": True, "store": False}, "store"),
        ({"background": True, "stream": True, "background_options": {"completion_window": "2h"}},
         "stream"),
        ({"background": True, "service_tier": "flex",
          "background_options": {"completion_window": "8h"}}, "service_tier"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "some"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"min_tokens": 9, "max_output_tokens": 8}, "min_tokens"),
        ({"messages": []}, "messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_the_name_it_has_here(
    body: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(RequestError) as refused:
        asked(**body)

    assert (refused.value.param or "").startswith(param or "input.0.content.0")


def test_a_conversation_before_goes_before_the_input_and_is_limited_with_it() -> None:
    before = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]

    found = messages(previous_response_id="resp_1", history=before, instructions="New ones.")

    assert [each["content"] for each in found] == ["New ones.", "Hello.", "Yes?", "Grind it."]
    with pytest.raises(RequestError, match="input") as refused:
        asked(history=before * 500)
    assert refused.value.param == "input"


def with_context(tokenizer: FileTokenizer, tokens: int) -> FileTokenizer:
    short = copy(tokenizer)
    short.context_tokens = tokens
    return short


def turns(number: int) -> list[dict[str, Any]]:
    """Of a conversation: each is a question, a call with its output, and an answer."""
    return [
        item
        for turn in range(number)
        for item in (
            {"role": "user", "content": f"Question {turn}."},
            {"type": "function_call", "call_id": f"c{turn}", "name": "grind", "arguments": "{}"},
            {"type": "function_call_output", "call_id": f"c{turn}", "output": "flour"},
            {"role": "assistant", "content": f"Answer {turn}."},
        )
    ]


@given(before=st.integers(0, 12), room=st.integers(150, 900))
def test_a_conversation_that_is_too_long_is_cut_by_as_few_turns_as_may_be(
    qwen: FileTokenizer, before: int, room: int
) -> None:
    short = with_context(qwen, room)

    def prompt(**body: Any) -> str:
        request = asked(instructions="Be brief.", max_output_tokens=8, **body)
        [found] = prepare(request, short, tiny_tokenizers.SETTINGS).prompts
        return qwen.decode(found, skip_special_tokens=False)

    given: dict[str, Any] = {"history": turns(before) or None, "input": "The last one?"}
    fitting = []
    for start in range(before + 1):
        with suppress(RequestError):
            fitting.append(prompt(**given | {"history": turns(before)[4 * start :] or None}))

    assert prompt(**given, truncation="auto") == fitting[0]
    assert "Be brief." in fitting[0] and "The last one?" in fitting[0]
    if len(fitting) <= before:
        with pytest.raises(RequestError, match="context"):
            prompt(**given)


def test_what_is_too_long_by_itself_is_refused_cut_or_not(qwen: FileTokenizer) -> None:
    for truncation in ("auto", "disabled"):
        with pytest.raises(RequestError, match="context"):
            prepare(
                asked(input="flour " * 200, truncation=truncation),
                with_context(qwen, 100),
                tiny_tokenizers.SETTINGS,
            )


def test_a_stored_request_reads_as_it_was_asked() -> None:
    items = [{"role": "user", "content": "a", "type": None}]
    request = asked(
        input=items, tools=[FUNCTION], text={"format": {"type": "json_object"}}, seed=3.0
    )

    assert parse_stored(json.loads(json.dumps(request.raw)), request.url, FORMAT) == request


def test_a_response_has_all_that_strict_clients_ask_for() -> None:
    told = shell()

    Response.model_validate(told, strict=True)
    assert told | NEVER_NULL == told
    assert told["id"] == f"resp_{ID.hex}"
    assert (told["status"], told["metadata"]) == ("queued", {"order": "17"})


@pytest.mark.parametrize(
    ("tier", "told"),
    [("auto", "default"), ("flex", "flex"), ("fast", "priority"), ("scale", "scale")],
)
def test_a_service_tier_is_given_back_as_a_legal_one(tier: str, told: str) -> None:
    assert shell(service_tier=tier)["service_tier"] == told


def test_what_was_asked_is_given_back(qwen: FileTokenizer) -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}
    allowed = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "grind"}],
    }

    told = response(
        qwen, "{}", tools=[FUNCTION], tool_choice=allowed, text={"format": form}, instructions="x",
        background=True, background_options={"completion_window": "8h", "continuation_id": "s"},
        user="u",
    )  # fmt: skip

    assert told["tools"] == [{**FUNCTION, "description": None, "strict": None}]
    assert told["tool_choice"] == allowed
    assert told["text"]["format"] == {**form, "description": None}
    assert told["background_options"] == {"completion_window": "8h", "continuation_id": "s"}


def test_an_answer_is_a_thought_a_message_and_calls_each_with_an_id_of_its_own(
    qwen: FileTokenizer,
) -> None:
    text = (
        "<think>\nGrain.\n</think>\n\nI will."
        '<tool_call>\n{"name": "grind", "arguments": {"fine": true}}\n</tool_call>'
    )

    told = response(qwen, text, tools=[FUNCTION])

    thought, said, call = told["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Grain."}]
    assert said["content"][0] | {"text": "I will."} == said["content"][0]
    assert (call["name"], call["arguments"]) == ("grind", '{"fine": true}')
    assert len({each["id"] for each in told["output"]}) == 3
    thinking = len(qwen._file.encode("<think>\nGrain.\n</think>", add_special_tokens=False).ids)
    assert told["usage"]["output_tokens_details"] == {"reasoning_tokens": thinking}
    assert told["status"] == "completed"


def test_what_is_cut_off_at_its_length_is_incomplete(qwen: FileTokenizer) -> None:
    told = response(qwen, "I wi", FinishReason.LENGTH)

    assert told["status"] == "incomplete"
    assert told["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [each["status"] for each in told["output"]] == ["incomplete"]
    # a thought that was cut off is all there is
    cut = response(qwen, "<think>Grai", FinishReason.LENGTH)
    assert [each["type"] for each in cut["output"]] == ["reasoning"]
    all_tokens = cut["usage"]["output_tokens"]
    assert cut["usage"]["output_tokens_details"] == {"reasoning_tokens": all_tokens}


def test_logprobs_have_bytes_even_of_special_tokens(qwen: FileTokenizer) -> None:
    end = qwen._file.token_to_id("<|im_end|>")
    scores = [TokenLogprob(65, -1.0, ((65, -1.0), (end, -2.0))), TokenLogprob(end, -0.5, ())]

    told = response(qwen, "A", logprobs=scores, top_logprobs=2)

    first, last = told["output"][0]["content"][0]["logprobs"]
    assert first["top_logprobs"][1]["bytes"] == list(b"<|im_end|>")
    assert (last["token"], last["bytes"]) == ("<|im_end|>", list(b"<|im_end|>"))


@pytest.mark.parametrize(
    ("state", "code", "status", "told"),
    [
        (JobState.COMPLETED, None, "completed", None),
        (JobState.CANCELLED, "cancelled", "cancelled", None),
        (JobState.EXPIRED, "deadline_exceeded", "failed", "server_error"),
        (JobState.FAILED, "engine_crash", "failed", "server_error"),
        (JobState.FAILED, "context_length_exceeded", "failed", "invalid_prompt"),
        (JobState.FAILED, None, "failed", "server_error"),
    ],
)
def test_each_end_of_a_job_is_a_legal_status_and_code(
    state: JobState, code: str | None, status: str, told: str | None
) -> None:
    found = ended(shell(), state, code, "It broke." if code else None)

    Response.model_validate(found, strict=True)
    assert found["status"] == status
    assert (found["error"] or {}).get("code") == told
    # and so is one with a part of an answer
    part = answered(
        shell(), Said("I wi"), [], reason=FinishReason.CANCELLED, counted=Usage(1, 1),
        state=state, error_code=code, error_message=None,
    )  # fmt: skip
    assert part["status"] == status
    assert part["usage"]["total_tokens"] == 2


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
SAID: Final = st.builds(
    Said,
    content=texts,
    reasoning=st.none() | texts,
    calls=st.lists(
        st.builds(Call, st.sampled_from(["grind", "sieve"]), st.sampled_from(["{}", '{"a": 1}'])),
        max_size=3,
    ),
)


@given(SAID, st.sampled_from(list(FinishReason)), st.sampled_from(list(JobState)[2:]))
def test_any_answer_is_valid_and_may_be_sent_back_as_it_is(
    found: Said, reason: FinishReason, state: JobState
) -> None:
    # given a response, whatever it says
    calls = [f"a1b2c3d4{place}" for place in range(len(found.calls))]
    told = answered(
        shell(tools=[FUNCTION]), found, calls, reason=reason, counted=Usage(3, 2, 1), state=state
    )
    Response.model_validate(told, strict=True)

    # when its output is sent back behind what was asked
    back = messages(input=[{"role": "user", "content": "Grind it."}, *told["output"]])

    # then the model sees one turn with all of it
    assert [each["role"] for each in back] == ["user", "assistant"]
    assert back[1]["content"] == found.content
    assert back[1].get("reasoning_content", "") == (found.reasoning or "")
    assert [each["id"] for each in back[1].get("tool_calls", [])] == calls


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.sampled_from(["type", "role", "content", "text", "id",
                                                       "output", "call_id", "name"]), inner),
                    max_leaves=12))  # fmt: skip
def test_odd_items_are_taken_or_refused_and_break_nothing(odd: Any) -> None:
    for body in ({"input": odd}, {"input": [odd]}, {"history": [odd]}, {"tools": [odd]}):
        with suppress(RequestError):
            asked(**body)
