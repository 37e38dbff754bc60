"""Texts to vectors: the model under the head that sentence-transformers' files describe."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForTextEncoding

from app.config.settings import ModelSettings
from app.engines.checkpoint import sentence_files
from app.engines.checkpoint.json_files import read_json
from app.engines.checkpoint.loading import load_model
from app.engines.checkpoint.sentence_files import SentenceFiles
from app.engines.encoder.pooling import Head
from app.jobs import PoolingParams

_WITH_DECODER: Final = frozenset({"mt5", "t5", "umt5"})
"""Model types whose plain model has a decoder behind the encoder, which is all that embeds."""


class Embedder:
    def __init__(self, folder: Path, settings: ModelSettings, device: torch.device) -> None:
        files = sentence_files.read(folder)
        config = read_json(folder / "config.json")
        # Poolers are for tasks of pretraining: checkpoints of masked language models have none.
        self.model: Any = load_model(
            self.auto_class(config), folder, settings.dtype, device, unused="pooler."
        )
        self._head = Head(files or SentenceFiles()).eval().to(device)

    @staticmethod
    def auto_class(config: dict[str, Any]) -> Any:
        return AutoModelForTextEncoding if config.get("model_type") in _WITH_DECODER else AutoModel

    def run(self, inputs: dict[str, Tensor], pooled: Tensor) -> Tensor:
        """(inputs, mask [rows, width] of the tokens to pool) → vectors [rows, size]."""
        vectors: Tensor = self._head(self.model(**inputs).last_hidden_state, pooled)
        return vectors

    def finish(self, vectors: Tensor, params: Seq[PoolingParams]) -> list[list[float]]:
        """Each row as it was asked for: cut to fewer dimensions, scaled to length 1."""
        unit = normalize(vectors, dim=-1)
        rows = [
            unit[row] if each.use_activation else vectors[row] for row, each in enumerate(params)
        ]
        for row, each in enumerate(params):
            if each.dimensions is not None and each.dimensions < len(rows[row]):
                cut = rows[row][: each.dimensions]
                rows[row] = normalize(cut, dim=0) if each.use_activation else cut
        return [row.tolist() for row in rows]
