"""The Triton kernels compute what is written in torch, shown by Triton's interpreter on a CPU."""

from __future__ import annotations

import copy
import importlib.util
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from app.engines.inflight import fused_cuda, paged, staging
from app.engines.inflight.cache import KVCache, LayerShape
from app.engines.inflight.drawing import draw
from app.engines.inflight.fused_cuda import FusedLayer
from app.engines.inflight.paged import PagedStep, Scratch
from app.engines.inflight.staging import Room, Samplers
from app.engines.sampling.sampler import BAD_ROW
from app.jobs import SamplingParams
from tests.unit.inflight_tiny import (
    again,
    engine_of,
    greedy,
    reference,
    reference_model,
    run_all,
    segments_of,
)

CPU = torch.device("cpu")
LAST = torch.zeros(1, dtype=torch.int64)  # where nobody looks for the last tokens

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed (it comes with torch for CUDA), or not asked to interpret: "
    "TRITON_INTERPRET=1 from the start of the process",
)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on the CPU."""
    monkeypatch.setattr(paged, "INTERPRETED", True)


@dataclass
class Case:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    window: int = 0
    softcap: float = 0.0


CASES = {
    "grouped": Case(),
    "one key head for each": Case(heads=3, kv_heads=3),
    "three to one": Case(heads=9, kv_heads=3, dim=32),
    "a size that is no power of two": Case(dim=24),
    "window": Case(window=40),
    "softcap": Case(softcap=1.5),
}


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", CASES)
def test_attention_over_pages_is_that_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # given rows that decode, short and long, and two chunks of prompts
    case = CASES[name]
    generator = torch.Generator().manual_seed(7)
    shape = LayerShape(case.kv_heads, case.dim, case.heads // case.kv_heads)
    cache = KVCache([shape], 60, torch.float32, CPU, paged=True)
    for part in (cache.keys[0], cache.values[0]):
        part.copy_(torch.randn(part.shape, generator=generator))
        part[cache.scrap] = float("nan")
    step = _step(cache, shape, [(0, 1), (37, 1), (600, 1), (5, 30), (0, 3), (70, 23)])
    query = torch.randn(len(step.slots), case.heads, case.dim, generator=generator)
    how = {"scale": 0.3, "window": case.window, "softcap": case.softcap}

    # when
    found = [step.mix(0, query, **how) for _ in range(2)]
    step.compiled = None
    wanted = step.mix(0, query, **how)

    # then, also the second time: counters are as they were
    for each in found:
        torch.testing.assert_close(each[:59], wanted[:59], rtol=1e-5, atol=1e-5)


def _step(cache: KVCache, shape: LayerShape, parts: list[tuple[int, int]]) -> PagedStep:
    """Segments of (start, count), in pages that lie in no order."""
    tables = np.random.default_rng(3).permutation(60)[: 6 * 20].astype(np.int32)
    tables = np.resize(tables, (len(parts), 20))
    queries = paged.queries_of([shape])
    order = staging.Order.of(segments_of(parts), queries)
    room = Room(64, 8, 30, 8)
    buffer = np.full(room.size + 200, -7, np.int32)
    staging.fill(room.views(buffer), order, tables, cache.scrap, 8, queries)
    views = room.views(torch.from_numpy(buffer))
    _, positions, slots = paged.taken(views.tokens, room.tokens, torch.zeros(9, dtype=torch.int64))
    return PagedStep(cache, Scratch([shape], 8, CPU), room, views, positions, slots, queries)


@needs_triton
def test_tokens_that_are_pending_come_from_their_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, rows = [7, staging.PENDING, 0, staging.PENDING], [3, 0, 2, 1]
    staged = torch.tensor([ids, [5, 6, 7, 8], [9, 9, 1, 2], rows], dtype=torch.int32)
    last = torch.tensor([41, 42, 43, 44])

    found = []
    for interpreted in (False, True):
        monkeypatch.setattr(paged, "INTERPRETED", interpreted)
        found.append([each.tolist() for each in paged.taken(staged, 3, last)])

    assert found[0] == found[1] == [[7, 41, 0], [5, 6, 7], [9, 9, 1]]


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_drawn_as_torch_draws_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given rows of every kind
    logits = (3 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits[6, 17] = float("nan")
    logits[7] = float("-inf")
    samplers = Samplers(8)
    for slot, params in enumerate(
        [
            SamplingParams(9, temperature=0.0),
            SamplingParams(9, temperature=1.0),
            SamplingParams(9, temperature=0.7, top_k=3),
            SamplingParams(9, temperature=1.3, top_p=0.2),
            SamplingParams(9, temperature=1.0, top_p=5e-324),  # nothing in float32
            SamplingParams(9, temperature=2.0, top_k=40, top_p=0.7, min_p=0.05),
            SamplingParams(9, temperature=1.0),
            SamplingParams(9, temperature=1.0, top_k=9),
        ]
    ):
        samplers.put(slot, params, seed=slot)

    for position in range(6):
        samples = np.zeros((8, 8), np.int32)
        samplers.fill(samples, np.arange(8), np.full(8, position))
        samples[staging.SAMPLE_ROW] = np.arange(8)
        staged, last = torch.from_numpy(samples), torch.full((8,), -5)

        # when
        found = draw(logits, staged, last)
        with monkeypatch.context() as patch:
            patch.setattr(paged, "INTERPRETED", False)
            wanted = draw(logits, staged, torch.zeros(8, dtype=torch.int64))

        # then
        assert found.tolist() == wanted.tolist()
        assert found[4] == logits[4].argmax()
        assert found.tolist()[6:] == [BAD_ROW, BAD_ROW]
        assert last.tolist() == [*wanted.tolist()[:6], 0, 0]


def test_tokens_come_as_often_as_their_weights_say() -> None:
    # given four tokens within the limits, and one that is not
    weights = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = weights.log()[None].expand(4000, -1) * 0.5
    samplers = Samplers(1)
    samplers.put(0, SamplingParams(1, temperature=0.5, top_p=0.94), seed=11)
    samples = np.zeros((8, 4000), np.int32)
    samplers.fill(samples, np.zeros(4000, int), np.arange(4000))

    # when
    drawn = draw(logits, torch.from_numpy(samples), LAST)

    # then
    shares = torch.bincount(drawn, minlength=5) / 4000
    torch.testing.assert_close(shares[:4], weights[:4] / 0.95, atol=0.03, rtol=0)
    assert shares[4] == 0


def test_a_draw_is_the_same_in_any_company() -> None:
    # given
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    samplers = Samplers(5)
    for slot in range(5):
        samplers.put(slot, SamplingParams(9, temperature=1.0, top_p=0.8), seed=slot)
    samples = np.zeros((8, 8), np.int32)
    samplers.fill(samples, np.arange(5), np.array([3, 1, 4, 1, 5]))
    alone = np.zeros((8, 4), np.int32)

    # when
    together = draw(logits, torch.from_numpy(samples), LAST)

    # then
    for slot, position in enumerate([3, 1, 4, 1, 5]):
        samplers.fill(alone, np.array([slot]), np.array([position]))
        one = draw(logits[slot : slot + 1], torch.from_numpy(alone), LAST)
        assert one.tolist() == [together[slot].item()]


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fused_layers_answer_as_generate_does(family: str) -> None:
    # given
    engine = engine_of(family, rows=2, ahead=again)
    fused = [each for each in engine._model.modules() if isinstance(each, FusedLayer)]
    assert len(fused) == 2

    # when a prompt in two parts, a row that decodes, and one more come together
    prompts = {1: (5, 6, 7), 2: tuple(range(60))}
    generations = run_all(engine, [greedy(i, prompt, 3) for i, prompt in prompts.items()])

    # then
    for i, prompt in prompts.items():
        assert generations[i].token_ids == reference(family, prompt, 3)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2", "smollm3"])
def test_layers_of_other_kinds_stay_as_they_are(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_cuda, "kernels", lambda _: object())
    model = copy.deepcopy(reference_model(family))

    fused_cuda.fuse_layers(model, [LayerShape(2, 16, 2)] * 2, {0: {}, 1: {}}, 64)

    assert not [each for each in model.modules() if isinstance(each, FusedLayer)]
