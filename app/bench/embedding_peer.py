"""Embeddings by sentence-transformers or an ONNX runtime. Runs in an environment of its own, so it
imports nothing of ours.

    python embedding_peer.py {sentence-transformers|onnxruntime} MODEL_FOLDER
Each line on standard input is a JSON list of texts; each is answered by a line {"vectors": …}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = 32

Run = Callable[[list[str]], list[list[float]]]

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def sentence_transformers(folder: str) -> Run:
    peer: Any = importlib.import_module("sentence_transformers")
    model = peer.SentenceTransformer(folder, device="cpu")

    def run(texts: list[str]) -> list[list[float]]:
        found = model.encode(texts, batch_size=ROWS, normalize_embeddings=True)
        vectors: list[list[float]] = found.tolist()
        return vectors

    return run


def onnxruntime(folder: str) -> Run:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModel

    peer: Any = importlib.import_module("onnxruntime")

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = AutoModel.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids, attention_mask).last_hidden_state

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.onnx"
        ids, mask = (torch.ones(2, 8, dtype=torch.int64) for _ in range(2))
        mask[1, 5:] = 0  # a mask of ones would be left out
        rows, width = torch.export.Dim("rows"), torch.export.Dim("width", max=512)
        torch.onnx.export(
            Plain().eval(),
            (ids, mask),
            file,
            input_names=["input_ids", "attention_mask"],
            output_names=["tokens"],
            dynamic_shapes=[{0: rows, 1: width}, {0: rows, 1: width}],
        )
        options = peer.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        session = peer.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def run(texts: list[str]) -> list[list[float]]:
        ids = [each.ids for each in tokenizer.encode_batch(texts)]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        vectors: list[list[float]] = [[]] * len(ids)
        for start in range(0, len(order), ROWS):
            places = order[start : start + ROWS]
            width = max(len(ids[place]) for place in places)
            padded = np.zeros((len(places), width), np.int64)
            mask = np.zeros_like(padded)
            for row, place in enumerate(places):
                padded[row, : len(ids[place])] = ids[place]
                mask[row, : len(ids[place])] = 1
            [tokens] = session.run(None, {"input_ids": padded, "attention_mask": mask})
            pooled = (tokens * mask[:, :, None]).sum(1)
            pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
            for place, vector in zip(places, pooled.tolist(), strict=True):
                vectors[place] = vector
        return vectors

    return run


def main() -> None:
    name, folder = sys.argv[1:]
    run = {"sentence-transformers": sentence_transformers, "onnxruntime": onnxruntime}[name](folder)
    for line in sys.stdin:
        print(json.dumps({"vectors": run(json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
