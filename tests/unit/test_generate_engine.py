"""The static engine: the same answers as `generate` alone, whatever else is in the batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Progress, Sequence
from app.engines.generate import engine as generate_module
from app.engines.registry import create
from app.errors import ConfigError, OutOfMemory
from app.jobs import FinishReason, Kind, SamplingParams
from tests.unit import tiny_models
from tests.unit.tiny_models import CONTEXT, EOS, VOCAB

PROMPTS = ["a", "the mill wheel", "stone", "water runs down to the old mill by the river", "?!"]


@pytest.fixture(scope="session", params=["llama", "gpt2", "t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save: Callable[[Path], Path] = getattr(tiny_models, f"save_{request.param}")
    return save(tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("only-llama") / "model")


def load(folder: Path, progress: Progress = lambda: None, **settings: Any) -> Engine:
    given = ModelSettings(
        source=str(folder),
        kind=Kind.GENERATE,
        engine="generate",
        **{"dtype": "float32", "context_tokens": CONTEXT} | settings,
    )
    return create("generate", folder, given, device="cpu", threads=1, progress=progress)


def sequence(id_: int, prompt: str, **params: Any) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 20, "temperature": 0.0} | params)
    return Sequence(id_, tuple(prompt.encode()), sampling)


def run(engine: Engine, *sequences: Sequence) -> list[Generation]:
    engine.admit("batch", sequences)
    answers: dict[int, Generation] = {}
    while engine.has_work:
        answers |= {answer.sequence_id: answer for answer in engine.step()}
    assert answers.keys() == {each.id for each in sequences}
    return [answers[each.id] for each in sequences]


def alone(folder: Path, prompt: str, max_tokens: int) -> list[int]:
    """What transformers generates for one prompt."""
    kind: Any = AutoModelForSeq2SeqLM if "t5" in str(folder) else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([list(prompt.encode())])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=EOS,
        pad_token_id=tiny_models.PAD,
    )[0].tolist()
    return out[1:] if "t5" in str(folder) else out[ids.shape[1] :]


def a_letter_of(text: str) -> str:
    """One that random tokens happened to spell, before the last."""
    return next(letter for letter in text[:-1] if letter.isascii())


def test_greedy_equals_generate_alone_for_every_row(folder: Path) -> None:
    engine = load(folder)
    lengths = [20, 3, 12, 1, 30]

    answers = run(
        engine,
        *(
            sequence(i, prompt, max_tokens=length)
            for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True))
        ),
    )

    for answer, prompt, length in zip(answers, PROMPTS, lengths, strict=True):
        assert answer.token_ids == alone(folder, prompt, length)
    assert len({tuple(answer.token_ids) for answer in answers}) == len(PROMPTS)


def test_a_seed_gives_the_same_text_alone_and_in_company(folder: Path) -> None:
    engine = load(folder)
    sampled = {"temperature": 1.0, "top_p": 0.95, "seed": 7}

    [single] = run(engine, sequence(1, "stone", **sampled))
    crowd = run(
        engine,
        sequence(1, "another, longer prompt", temperature=1.3),
        sequence(2, "stone", **sampled),
        sequence(3, "stone", **sampled | {"seed": 8}),
    )

    assert crowd[1].token_ids == single.token_ids
    assert crowd[2].token_ids != single.token_ids


def test_a_stop_string_ends_only_its_own_row(llama: Path) -> None:
    engine = load(llama)
    [free] = run(engine, sequence(1, "wheel"))
    stop = a_letter_of(free.text)

    stopped, other = run(engine, sequence(1, "wheel", stop=(stop,)), sequence(2, "wheel"))

    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.text == free.text[: free.text.index(stop)]
    assert other.text == free.text


def test_log_probabilities_are_the_models_own(llama: Path) -> None:
    engine = load(llama)
    prompt = tuple(b"wheel")

    [answer, plain] = run(
        engine,
        sequence(1, "wheel", max_tokens=4, logprobs=2, temperature=0.7, seed=1),
        sequence(2, "wheel", max_tokens=4),
    )

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0]
    expected = torch.log_softmax(logits[len(prompt) - 1 :], dim=-1)
    assert answer.logprobs is not None
    assert [each.token_id for each in answer.logprobs] == answer.token_ids
    for place, each in enumerate(answer.logprobs):
        assert each.logprob == pytest.approx(expected[place, each.token_id].item(), abs=1e-4)
        top = expected[place].topk(2)
        assert [token for token, _ in each.top] == top.indices.tolist()
        assert [value for _, value in each.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert plain.logprobs is None


def test_a_cancelled_row_comes_back_with_what_it_has_and_frees_the_batch(llama: Path) -> None:
    steps: list[None] = []

    def progress() -> None:
        steps.append(None)
        if len(steps) == 3:
            thread = threading.Thread(target=engine.cancel, args=[1])
            thread.start()
            thread.join()

    engine = load(llama, progress)

    cancelled, mate = run(
        engine,
        sequence(1, "wheel", max_tokens=80, ignore_eos=True),
        sequence(2, "stone", max_tokens=6, ignore_eos=True),
    )

    assert cancelled.finish_reason is FinishReason.CANCELLED
    assert cancelled.token_ids == alone(llama, "wheel", 3)
    assert mate.finish_reason is FinishReason.LENGTH
    assert len(mate.token_ids) == len(steps) == 6


def test_a_sequence_cancelled_before_its_batch_is_not_run(llama: Path) -> None:
    engine = load(llama)
    engine.cancel(1)

    cancelled, mate = run(engine, sequence(1, "wheel"), sequence(2, "stone"))

    assert (cancelled.finish_reason, cancelled.token_ids) == (FinishReason.CANCELLED, [])
    assert mate.finish_reason is not FinishReason.CANCELLED


def test_a_row_without_finite_logits_fails_alone(llama: Path, tmp_path: Path) -> None:
    # given a model whose embedding of "!" is not a number
    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.model.embed_tokens.weight.data[ord("!")] = float("nan")
    model.save_pretrained(tmp_path)
    tiny_models.save_tokenizer(tmp_path)
    engine = load(tmp_path)

    # when
    bad, good = run(
        engine, sequence(1, "oh!", temperature=1.0, top_p=0.5), sequence(2, "wheel", max_tokens=3)
    )

    # then
    assert (bad.finish_reason, bad.error_code) == (FinishReason.ERROR, "not_finite")
    assert good.token_ids == alone(tmp_path, "wheel", 3)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (Sequence(1, (), SamplingParams(3)), "invalid_request"),
        (Sequence(1, (VOCAB,), SamplingParams(3)), "invalid_request"),
        (Sequence(1, (-1,), SamplingParams(3)), "invalid_request"),
        (Sequence(1, (5, 6)), "invalid_request"),
        (Sequence(1, (5,) * (CONTEXT - 2), SamplingParams(3)), "context_length_exceeded"),
    ],
)
def test_what_the_model_cannot_take_fails_alone(llama: Path, wrong: Sequence, code: str) -> None:
    engine = load(llama)

    bad, good = run(engine, wrong, sequence(2, "wheel", max_tokens=3))

    assert (bad.finish_reason, bad.error_code) == (FinishReason.ERROR, code)
    assert good.token_ids == alone(llama, "wheel", 3)


def test_a_long_prompt_and_a_long_answer_share_a_batch_of_a_model_with_fixed_places(
    tmp_path: Path,
) -> None:
    folder = tiny_models.save_gpt2(tmp_path / "gpt2")
    engine = load(folder)
    long_prompt, long_answer = "x" * (CONTEXT - 4), CONTEXT - 2

    first, second = run(
        engine,
        sequence(1, long_prompt, max_tokens=4),
        sequence(2, "ab", max_tokens=long_answer, ignore_eos=True),
    )

    assert first.token_ids == alone(folder, long_prompt, 4)
    assert len(second.token_ids) == long_answer


def test_shares_of_device_time_sum_and_who_stays_longer_pays_more(llama: Path) -> None:
    engine = load(llama)

    short, long = run(
        engine,
        sequence(1, "wheel", max_tokens=2),
        sequence(2, "stone", max_tokens=40, ignore_eos=True),
    )

    [stats] = engine.take_stats()
    assert stats.device_ns == short.device_ns + long.device_ns
    assert 0 < short.device_ns < long.device_ns
    assert short.breakdown and long.breakdown
    assert abs(short.breakdown.prefill_ns - long.breakdown.prefill_ns) <= 1  # of equal prompts
    assert 0 < short.breakdown.prefill_ns < short.device_ns
    assert (stats.rows, stats.useful_tokens, stats.padded_tokens) == (2, 5 + 2 + 5 + 40, 2 * 45)
    assert short.started_ns < short.first_token_ns <= short.finished_ns < long.finished_ns


def test_the_batch_ends_with_its_last_row(llama: Path) -> None:
    steps: list[None] = []
    engine = load(llama, lambda: steps.append(None))
    [free] = run(engine, sequence(1, "wheel", max_tokens=30))
    steps.clear()

    [stopped] = run(engine, sequence(1, "wheel", max_tokens=30, stop=(a_letter_of(free.text),)))

    assert len(steps) == len(stopped.token_ids) < len(free.token_ids)


def test_out_of_memory_drops_the_batch_and_leaves_the_engine_whole(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(llama)
    real = generate_module.RowSampler.sample

    def too_big(*_: Any) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(generate_module.RowSampler, "sample", too_big)
    engine.admit("batch", [sequence(1, "wheel")])
    with pytest.raises(OutOfMemory):
        engine.step()
    monkeypatch.setattr(generate_module.RowSampler, "sample", real)

    assert not engine.has_work
    assert run(engine, sequence(2, "wheel", max_tokens=3))[0].token_ids == alone(llama, "wheel", 3)


def test_a_model_that_lacks_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    kept = {name: weight for name, weight in model.state_dict().items() if "q_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    tiny_models.save_tokenizer(tmp_path)

    with pytest.raises(ConfigError, match=r"lacks weights .*q_proj"):
        load(tmp_path)


def test_an_unknown_engine_is_refused_by_name(llama: Path) -> None:
    settings = ModelSettings(source="x", kind=Kind.GENERATE, engine="generate")

    with pytest.raises(ConfigError, match="Unknown engine millstone; known are encoder, generate"):
        create("millstone", llama, settings, device="cpu", threads=1, progress=lambda: None)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(llama: Path, device: str) -> None:
    settings = ModelSettings(source="x", kind=Kind.GENERATE, engine="generate")

    with pytest.raises(ConfigError, match=device.partition(":")[0]):
        create("generate", llama, settings, device=device, threads=1, progress=lambda: None)
