"""Tiny decoders with random weights, one of each family, and what `generate` says to a prompt."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from app.config.settings import ModelSettings
from app.engines.base import Generation, Sequence
from app.engines.inflight.cache import KVCache, LayerShape
from app.engines.inflight.engine import InflightEngine
from app.engines.inflight.graphs import Record, Work
from app.engines.inflight.scheduler import Row, Segment
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import StubTokenizer
from app.jobs import FinishReason, Kind, SamplingParams

VOCAB = 97
CONTEXT = 192
BYTES = StubTokenizer(ModelSettings(source="stub", kind=Kind.GENERATE, engine="stub"))

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "smollm3": {**_SMALL, "no_rope_layers": [1, 0]},
    "mistral": {**_SMALL, "sliding_window": 20},
    "qwen2": {**_SMALL, **_LAYERS, "use_sliding_window": True},
    "qwen3": _SMALL,
    "gemma2": {**_SMALL, **_LAYERS, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_SMALL, **_LAYERS, "query_pre_attn_scalar": 16},
    "phi3": {**_SMALL, "sliding_window": None},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


@functools.cache
def folder_of(family: str) -> Path:
    """A model folder; it lives as long as the test process."""
    folder = tempfile.TemporaryDirectory(prefix="gristmill-tiny-")
    _FOLDERS.append(folder)
    torch.manual_seed(sum(family.encode()))
    config = AutoConfig.for_model(family, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder.name)
    words = Tokenizer(models.WordLevel({f"w{place}": place for place in range(VOCAB)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder.name)
    return Path(folder.name)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def reference_model(family: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32).eval()


@functools.cache
def reference(family: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What `model.generate` answers greedily, alone."""
    tokens = torch.tensor([prompt])
    out = reference_model(family).generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def engine_of(
    family: str,
    *,
    rows: int = 4,
    portable: bool = False,
    ahead: Record | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    **options: int | str,
) -> InflightEngine:
    """With `ahead` steps are launched and recorded by it as on a CUDA device, but on the CPU."""
    settings = ModelSettings(
        source="tiny",
        kind=Kind.GENERATE,
        engine="inflight",
        dtype=dtype,
        max_batch_size=rows,
        options=dict(options),
    )
    engine = InflightEngine(folder_of(family), settings, "cpu", 1, lambda: None)
    if portable:
        engine._kernel = None
    return engine if ahead is None else run_ahead(engine, ahead)


def run_ahead(engine: InflightEngine, record: Record) -> InflightEngine:
    """Launches steps as on a CUDA device, but on the CPU."""
    shapes = [
        LayerShape(keys.shape[1], keys.shape[2], heads_of(engine) // keys.shape[1])
        for keys in engine._cache.keys
    ]
    engine._cache = KVCache(
        shapes, engine._scheduler.num_blocks, torch.float32, torch.device("cpu"), paged=True
    )
    engine._launcher = engine._launcher_for(shapes, engine._cache, engine._scheduler.tables)
    engine._launcher.record(engine._budget.most, record)
    return engine


def heads_of(engine: InflightEngine) -> int:
    heads: int = engine._model.config.num_attention_heads
    return heads


def again(work: Work) -> Work:
    """Records nothing: the same work is done again, on the same memory."""
    return work


def greedy(sequence_id: int, prompt: Seq[int], max_tokens: int, **fields: Any) -> Sequence:
    params = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
    return Sequence(sequence_id, tuple(prompt), params, **fields)


def run_all(engine: InflightEngine, sequences: Seq[Sequence]) -> dict[int, Generation]:
    """Admit together, run to the end."""
    engine.admit("batch", sequences)
    return run_out(engine)


def run_out(engine: InflightEngine) -> dict[int, Generation]:
    generations = {}
    while engine.has_work:
        generations.update({each.sequence_id: each for each in engine.step()})
    return generations


def segments_of(parts: Seq[tuple[int, int]]) -> list[Segment]:
    """Segments of rows in slots of their own, as (start, count); each row's token is due."""
    segments = []
    for slot, (start, count) in enumerate(parts):
        sequence = greedy(slot, [place % VOCAB for place in range(start + count)], 1)
        params = sequence.params
        assert params is not None
        row = Row(
            sequence=sequence,
            params=params,
            batch_id="batch",
            arrival=slot,
            generation=Generation(slot, FinishReason.ERROR),
            output=Output(params, BYTES, ()),
            tokens=list(sequence.prompt_token_ids),
            slot=slot,
        )
        segments.append(Segment(row, start, count))
    return segments
