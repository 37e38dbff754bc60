"""Embeddings from an encoder such as BERT: pooled token vectors, scaled to length 1.

How tokens are pooled is read from the files of sentence-transformers in the model's folder (mean
where there are none). Vectors always come back normalized, as in the OpenAI API, so that the dot
product of two is their cosine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModel

from app.config.settings import ModelSettings
from app.costs import prefill_weights, share
from app.engines.base import NOT_FINITE, Generation, Progress, Sequence, StepStats
from app.engines.device import load_model
from app.engines.models import load_json, read_json
from app.engines.static import StaticEngine
from app.engines.tokenizer import load_tokenizer
from app.errors import ConfigError, RequestError
from app.jobs import FinishReason

Pool = Callable[[Tensor, Tensor], Tensor]
"""(token vectors [rows, width, size], mask [rows, width, 1] of 0 and 1) → [rows, size]."""


class EncoderEngine(StaticEngine):
    def __init__(
        self, folder: Path, settings: ModelSettings, device: str, threads: int, progress: Progress
    ) -> None:
        super().__init__(load_tokenizer(folder, settings), settings, device, threads, progress)
        if self._tokenizer.separate_output:
            raise ConfigError("The engine encoder cannot run an encoder-decoder.")
        self._pool = _pooling(folder)
        self._model: Any = load_model(AutoModel, folder, settings.dtype, self._device)

    def _check(self, sequence: Sequence) -> None:
        if sequence.params is not None:
            raise RequestError("This model gives embeddings; it does not generate text.")

    def _run(self, sequences: Seq[Sequence], stats: StepStats) -> list[Generation]:
        """In passes of like length, so that padding stays below the half of each."""
        answers: list[Generation] = []
        ordered = sorted(sequences, key=_length)
        for _, rows in groupby(ordered, key=lambda each: _length(each).bit_length()):
            answers += self._embed(list(rows), stats)
            self._progress()
        return answers

    def _embed(self, rows: list[Sequence], stats: StepStats) -> list[Generation]:
        """One pass of the model. Rows that were cancelled meanwhile are answered all the same."""
        began = time.monotonic_ns()
        ids, mask = self._padded(rows)
        tokens = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        pooled = self._pool(tokens, mask[:, :, None])
        vectors = torch.nn.functional.normalize(pooled, dim=-1)
        finite = vectors.isfinite().all(-1).tolist()  # waits for the device
        ended = time.monotonic_ns()
        stats.useful_tokens += int(sum(map(_length, rows)))
        stats.padded_tokens += ids.numel()
        shares = share(ended - began, prefill_weights([_length(each) for each in rows]))
        answers = [
            Generation(
                each.id,
                FinishReason.STOP,
                embedding=vector,
                input_tokens=_length(each),
                device_ns=device_ns,
                started_ns=began,
                first_token_ns=ended,
                finished_ns=ended,
            )
            for each, vector, device_ns in zip(rows, vectors.tolist(), shares, strict=True)
        ]
        for answer, is_finite in zip(answers, finite, strict=True):
            if not is_finite:
                answer.finish_reason, answer.embedding = FinishReason.ERROR, None
                answer.error_code, answer.error_message = NOT_FINITE
        return answers

    def _padded(self, rows: Seq[Sequence]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, [rows, width] each."""
        shape = len(rows), max(map(_length, rows))
        ids = torch.full(shape, self._model.config.pad_token_id or 0, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : _length(row)] = torch.tensor(row.prompt_token_ids)
            mask[place, : _length(row)] = 1
        return ids.to(self._device), mask.to(self._device)


def _length(sequence: Sequence) -> int:
    return len(sequence.prompt_token_ids)


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    return (tokens * mask).sum(1) / mask.sum(1)


def _first(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens[:, 0]


def _last(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens[torch.arange(len(tokens)), mask.sum(1)[:, 0] - 1]


def _largest(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens.masked_fill(mask == 0, float("-inf")).amax(1)


POOLING: Final[dict[str, Pool]] = {
    "mean": _mean,
    "cls": _first,
    "lasttoken": _last,
    "max": _largest,
}


def _pooling(folder: Path) -> Pool:
    """As sentence-transformers' files say, mean where there are none.

    Raises `ConfigError` for anything else that they would do to the vectors.
    """
    modules = load_json(folder / "modules.json", missing=[])
    paths = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    if unknown := paths.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ConfigError(f"The engine encoder has no module {', '.join(sorted(unknown))}.")
    if "Pooling" not in paths:
        return _mean
    config = read_json(folder / paths["Pooling"] / "config.json")
    # Older files have a flag for each mode, as in pooling_mode_mean_tokens.
    flags = [name for name, value in config.items() if value is True and "pooling_mode" in name]
    modes = [flag.removeprefix("pooling_mode_").partition("_token")[0] for flag in flags]
    mode = config.get("pooling_mode") or "+".join(modes)
    if mode not in POOLING:
        raise ConfigError(f"The engine encoder pools by {', '.join(POOLING)}, not by {mode}.")
    return POOLING[mode]
