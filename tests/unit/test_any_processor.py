"""Both engines answer on every processor: with kernels for it, for all of its kind, or none."""

from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Final, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from app.config.settings import ModelSettings
from app.engines.base import Sequence
from app.engines.inflight import library
from app.engines.inflight.library import FLAGS, Built, compile_to
from app.engines.registry import create
from app.jobs import FinishReason, Kind
from tests.unit import tiny_encoders
from tests.unit.inflight_tiny import engine_of, greedy, reference, run_all

FAMILIES: Final = ("bert", "modernbert", "albert")
"""Two whose layers are calls of our kernel where it multiplies, and one of no known layer."""

AVX2: Final = "-march=x86-64-v3"

PROMPTS: Final = ((5,), tuple(range(40)), tuple(range(7, 90)))

Type = Literal["float32", "bfloat16"]
types = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
on_any_processor = pytest.mark.usefixtures("processor")


@functools.cache
def compiled(*tuning: str) -> ctypes.CDLL:
    """The kernels; without tuning as they are for a processor without any extension."""
    file = Path(tempfile.mkdtemp()) / "kernels.so"
    compile_to(file, ["c++"], tuning)
    return ctypes.CDLL(str(file))


@pytest.fixture(params=["this", "any of its kind", "AVX2", "matrix tiles", "no compiler"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "no compiler" and shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    found = dict(torch.cpu.get_capabilities())
    match request.param:
        case "any of its kind":
            monkeypatch.setattr(library, "built", lambda: Built(compiled(), "compiled"))
        case "AVX2":
            if not found.get("avx2"):
                pytest.skip("this processor has no AVX2")
            monkeypatch.setattr(library, "built", lambda: Built(compiled(AVX2), "compiled"))
            found |= dict.fromkeys(("avx512_f", "avx512_bf16", "amx_bf16"), False)
        case "matrix tiles":  # those of oneDNN are faster than our products
            found |= {"amx_bf16": True}
        case "no compiler":
            monkeypatch.setattr(library, "built", lambda: Built(None, "torch alone"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_processor_without_extensions_has_kernels_without_products() -> None:
    assert not any(flag.startswith("-m") for flag in FLAGS)
    assert hasattr(compiled(), "attend_float32")
    assert not hasattr(compiled(), "multiply_float32")


@on_any_processor
@types
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_have_the_plain_model_s_vectors(family: str, dtype: Type, tmp_path: Path) -> None:
    # given
    sizes = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 400}
    folder = tiny_encoders.save_encoder(tmp_path, family, **sizes)
    texts = [Sequence(n, tuple(5 + 7 * at % 240 for at in range(n))) for n in (1, 17, 130, 300)]
    settings = ModelSettings(
        source=str(folder), kind=Kind.EMBED, engine="encoder", dtype=dtype, context_tokens=400
    )
    wanted = _plain(tiny_encoders.auto_class(family).from_pretrained(folder), texts)

    # when
    engine = create("encoder", folder, settings, device="cpu", threads=2, progress=lambda: None)
    engine.admit("batch", texts)
    found = torch.tensor([each.embedding for each in engine.step()])

    # then
    if dtype == "float32":
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert cosine_similarity(found, wanted).min() > 0.99


@on_any_processor
@types
def test_prompts_are_answered(dtype: Type) -> None:
    engine = engine_of("llama", dtype=dtype)

    answers = run_all(engine, [greedy(n, prompt, 24) for n, prompt in enumerate(PROMPTS)])

    assert {each.finish_reason for each in answers.values()} == {FinishReason.LENGTH}
    assert [len(each.token_ids) for each in answers.values()] == [24] * len(PROMPTS)
    if dtype == "float32":
        wanted = [reference("llama", prompt, 24) for prompt in PROMPTS]
        assert [answers[n].token_ids for n in range(len(PROMPTS))] == wanted


def _plain(model: torch.nn.Module, texts: list[Sequence]) -> Tensor:
    """The mean of each text's token vectors alone, of length 1."""
    with torch.inference_mode():
        found = [model(torch.tensor([each.prompt_token_ids])).last_hidden_state for each in texts]
    return normalize(torch.stack([each[0].mean(0) for each in found]), dim=-1)
