"""How likely a model finds a prompt's own tokens, and how a completion that repeats it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Sequence, TokenLogprob
from app.engines.inflight.engine import InflightEngine
from app.engines.text.tokenizer import Tokenizer
from app.errors import RequestError
from app.jobs import FinishReason, Kind, SamplingParams
from app.requests import replies
from app.requests.bodies import parse
from app.requests.prepare import prepare
from tests.unit import tiny_models
from tests.unit.inflight_tiny import again, run_ahead
from tests.unit.test_stopping import BYTES, SETTINGS
from tests.unit.test_texts import few, tokenizer, tokens
from tests.unit.tiny_models import load
from tests.unit.tiny_tokenizers import KINDS

LONG = tuple(b"the miller opened the gate, and the wheel began to turn in the water, slowly: 7")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("scores") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sequence(id_: int, prompt: tuple[int, ...], scored: int | None = 2, **params: Any) -> Sequence:
    given: dict[str, Any] = {"temperature": 0.0, "prompt_logprobs": scored, "logprobs": scored}
    return Sequence(id_, prompt, SamplingParams(**{"max_tokens": 4} | given | params))


def run(engine: Engine, *sequences: Sequence) -> dict[int, Generation]:
    engine.admit("batch", sequences)
    found = {}
    while engine.has_work:
        found.update({each.sequence_id: each for each in engine.step()})
    return found


def is_scored(model: Any, prompt: tuple[int, ...], answer: Generation) -> None:
    """Whether each token of the prompt is as likely as the model itself says."""
    expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    scores = answer.prompt_logprobs or []
    assert [each.token_id for each in scores] == list(prompt[1:])
    found = torch.tensor([each.logprob for each in scores])
    came = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, came, atol=2e-3, rtol=1e-3)
    best, _ = expected.topk(2)
    likeliest = torch.tensor([[logprob for _, logprob in each.top] for each in scores])
    torch.testing.assert_close(likeliest, best, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("is_ahead", [False, True], ids=["", "a step ahead"])
@pytest.mark.parametrize("prefill_tokens", [7, 70])
def test_the_tokens_of_a_prompt_are_scored_as_the_model_does(
    folder: Path, model: Any, prefill_tokens: int, is_ahead: bool
) -> None:
    # given prompts that come in pieces, share a beginning, and run beside others
    engine = load(folder, prefill_tokens=prefill_tokens)
    assert isinstance(engine, InflightEngine)
    if is_ahead:
        run_ahead(engine, again)
    prompts = {1: LONG, 2: LONG[:40] + tuple(b"stops"), 3: LONG[:1], 4: LONG[:2]}
    mates = {5: LONG[:30], 6: LONG}
    alone = run(load(folder), *(sequence(i, it, None) for i, it in (prompts | mates).items()))

    # when
    run(engine, sequence(9, LONG, None))
    answers = run(
        engine,
        *(sequence(i, it) for i, it in prompts.items()),
        *(sequence(i, it, None) for i, it in mates.items()),
    )

    # then
    for i, prompt in prompts.items():
        if len(prompt) > 1:
            is_scored(model, prompt, answers[i])
        assert len(answers[i].logprobs or ()) == len(answers[i].token_ids)
        assert answers[i].device_ns > 0
    assert not answers[3].prompt_logprobs
    for i, answer in answers.items():
        assert answer.token_ids == alone[i].token_ids
    assert answers[5].prompt_logprobs is None


def test_a_row_that_loses_its_place_is_scored_once(folder: Path, model: Any) -> None:
    # given a cache that does not hold all that these rows will want
    engine = load(folder, rows=3, cache_tokens=3 * 32)
    assert isinstance(engine, InflightEngine)
    lost = []
    preempt = engine._scheduler._preempt
    engine._scheduler._preempt = lambda: lost.append(row := preempt()) or row  # type: ignore[method-assign, func-returns-value]
    prompts = {i: (65 + i, *LONG[:25]) for i in range(3)}

    answers = run(engine, *(sequence(i, it, max_tokens=40) for i, it in prompts.items()))

    assert lost
    for i, prompt in prompts.items():
        is_scored(model, prompt, answers[i])


def test_a_prompt_whose_scores_are_no_numbers_fails_alone(folder: Path) -> None:
    # given a model in which one token is poison
    engine = load(folder)
    assert isinstance(engine, InflightEngine)
    engine._model.get_input_embeddings().weight.data[ord("#")] = float("nan")

    answers = run(engine, sequence(1, tuple(b"a # mill")), sequence(2, LONG), sequence(3, LONG))

    assert answers[1].error_code == "not_finite"
    assert [answers[i].error_code for i in (2, 3)] == [None, None]
    assert len(answers[2].prompt_logprobs or ()) == len(LONG) - 1


# ── completions that repeat their prompt ────────────────────────────────────────────────────────


def completion(of: Tokenizer, fields: dict[str, Any], answer: list[int], text: str) -> Any:
    """A choice of a completion, as a client gets it."""
    request = parse(fields)
    prepared = prepare(request, of, SETTINGS)
    [prompt] = prepared.prompts
    assert prepared.params
    known = prepared.params.prompt_logprobs is not None
    generation = Generation(
        1,
        FinishReason.STOP,
        answer,
        text,
        [TokenLogprob(each, -1.0, ((each, -1.0),)) for each in answer],
        prompt_logprobs=[TokenLogprob(it, -2.0, ((it, -2.0),)) for it in prompt[1:]]
        if known
        else None,
        input_tokens=len(prompt),
    )
    body = replies.body(
        request,
        [generation],
        job_id="1",
        model="m",
        created=0,
        tokenizer=of,
        prompts=prepared.prompts,
    )
    return body["choices"][0] | {"usage": body["usage"]}


def test_an_echo_is_the_prompt_with_the_answer_behind_it() -> None:
    fields = {"prompt": "a mill", "echo": True, "logprobs": 1, "max_tokens": 2}

    found = completion(BYTES, fields, [*b"s."], "s.")

    assert found["text"] == "a mills."
    told = found["logprobs"]
    assert told["tokens"] == [*"a mills."]
    assert told["token_logprobs"] == [None, *[-2.0] * 5, -1.0, -1.0]
    assert told["top_logprobs"][:2] == [None, {" ": -2.0}]
    assert told["text_offset"] == [*range(8)]


def test_a_prompt_alone_is_scored_with_max_tokens_0() -> None:
    fields = {"prompt": "a mill", "echo": True, "logprobs": 0, "max_tokens": 0}

    found = completion(BYTES, fields, [*b"s"], "s")

    assert (found["text"], found["finish_reason"]) == ("a mill", "length")
    assert found["logprobs"]["token_logprobs"] == [None, *[-2.0] * 5]
    counts = [found["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total")]
    assert counts == [6, 0, 6]
    with pytest.raises(RequestError, match="0 only with echo") as refused:
        parse({"prompt": "a mill", "max_tokens": 0})
    assert refused.value.param == "max_tokens"


def test_an_echo_without_log_probabilities_is_text_alone() -> None:
    found = completion(BYTES, {"prompt": [97, 98], "echo": True, "max_tokens": 1}, [99], "c")

    assert found["text"] == "abc"


def test_an_engine_that_scores_no_prompts_is_told_at_the_door() -> None:
    other = ModelSettings(source="x", kind=Kind.GENERATE, engine="generate")
    request = parse({"prompt": "a", "echo": True, "logprobs": 1})

    with pytest.raises(RequestError, match="engine generate of this model gives no log") as refused:
        prepare(request, BYTES, other)

    assert refused.value.param == "echo"
    prepare(parse({"prompt": "a", "echo": True}), BYTES, other)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data())
def test_each_token_of_an_echo_begins_where_its_offset_says(kind: str, data: st.DataObject) -> None:
    # given token ids, as programs that evaluate models send them
    prompt, answer = data.draw(tokens(kind, min_size=1)), data.draw(tokens(kind, min_size=1))
    of = tokenizer(kind)
    spelling = replies.logprobs.Spelling(of, prompt)
    scored = spelling.in_order([TokenLogprob(each, 0.0) for each in answer], spelling.first)
    joined = b"".join(spelling.bytes_of(each.token_id, before) for each, before in scored)

    # when
    fields = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": len(answer)}
    found = completion(of, fields, answer, joined.decode(errors="replace"))

    # then
    told, text = found["logprobs"], found["text"]
    offsets = told["text_offset"]
    assert len(offsets) == len(told["tokens"]) == len(prompt) + len(answer)
    assert offsets == sorted(offsets) and offsets[-1] <= len(text)
    for token, name, offset in zip(prompt + answer, told["tokens"], offsets, strict=True):
        if token not in of.special and not name.startswith("bytes:"):
            assert text[offset:].startswith(name)
