"""Texts in, one answer each: an embedder's vector, a classifier's or cross-encoder's scores.

A batch is run in passes: of packed tokens where the model can be packed (`packing`), else of texts
of like length, padded. When the model is loaded it is tried at the longest text it allows, and in
company: a model whose answer depends on the padding beside it runs texts of one length together, or
each alone.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from app.books.shares import prefill_weights, share
from app.config.settings import ModelSettings
from app.engines.base import NOT_FINITE, Breakdown, Generation, Progress, Sequence, StepStats
from app.engines.checkpoint.card import read_card
from app.engines.checkpoint.json_files import read_json
from app.engines.checkpoint.loading import check_fits
from app.engines.device import ran_out_of_memory
from app.engines.encoder.classifier import Classifier
from app.engines.encoder.embedder import Embedder
from app.engines.encoder.packing import Packing, Unpackable
from app.engines.generate.company import TOLERANCE, Company, Memory, thresholds
from app.engines.inflight.library import built
from app.engines.static import StaticEngine
from app.engines.text.tokenizer import Tokenizer, load_tokenizer
from app.errors import ConfigError, RequestError
from app.jobs import FinishReason, Kind

_TRIED: Final = 7, 41
"""Tokens of two texts that are tried alone and together: odd, so that no block of them is full."""

_PACKED_TRIED: Final = *_TRIED, 301
"""The same before a model is packed; the last reaches beyond the usual windows of attention."""

_PASS_TOKENS: Final = 1024
"""Of packed texts, or one text of more: what layers hand on then stays in the processor's cache."""


class EncoderEngine(StaticEngine):
    def __init__(
        self, folder: Path, settings: ModelSettings, device: str, threads: int, progress: Progress
    ) -> None:
        super().__init__(load_tokenizer(folder, settings), settings, device, threads, progress)
        if unknown := settings.options.keys() - {"matryoshka"}:
            raise ConfigError(f"The engine encoder has no option {', '.join(sorted(unknown))}.")
        read_card(folder, settings)  # says what does not fit, before weights are read
        self._kind = settings.kind
        task = Embedder if settings.kind is Kind.EMBED else Classifier
        self._task: Embedder | Classifier = task(folder, settings, self._device)
        config = self._task.model.config
        self._memory = Memory(self._task.model)
        self._pad = _pad_token(config)
        self._takes_types = _takes_types(self._task.model)
        self._packing: Packing | None = None
        self._unpacked = ""  #: why, if it is not
        with torch.inference_mode():
            self._company = self._try_model()
            if self._company.padded_tokens:
                self._unpacked = self._try_packing()

    @property
    def kernels(self) -> str:
        """What computes, for people."""
        if self._packing is None:
            return f"torch, {self._company}" + (f"; {self._unpacked}" if self._unpacked else "")
        layers = "whole layers" if self._packing.whole else "attention"
        return f"{built().state}, {layers} of packed texts"

    def _check(self, sequence: Sequence) -> None:
        if sequence.params is not None:
            raise RequestError("This model answers with vectors or scores; it generates no text.")

    def _run(self, sequences: Seq[Sequence], stats: StepStats) -> list[Generation]:
        answers: list[Generation] = []
        for rows in _passes(sequences, self._company, packs=self._packing is not None):
            answers += self._pass(rows, stats)
            self._progress()
        return answers

    def _pass(self, rows: list[Sequence], stats: StepStats) -> list[Generation]:
        """One pass of the model. Rows that were cancelled meanwhile are answered all the same."""
        began = time.monotonic_ns()
        raw = self._forward(rows).cpu()  # waits for the device
        finite = raw.isfinite().all(-1).tolist()
        values = self._task.finish(raw, [each.pooling for each in rows])
        ended = time.monotonic_ns()
        stats.useful_tokens += sum(map(_length, rows))
        stats.padded_tokens += (
            len(rows) * max(map(_length, rows))
            if self._packing is None
            else sum(map(_length, rows))
        )
        shares = share(ended - began, prefill_weights([_length(each) for each in rows]))
        answers = [
            Generation(
                each.id,
                FinishReason.STOP,
                input_tokens=_length(each),
                device_ns=device_ns,
                breakdown=Breakdown(prefill_ns=device_ns),
                started_ns=began,
                first_token_ns=ended,
                finished_ns=ended,
            )
            for each, device_ns in zip(rows, shares, strict=True)
        ]
        for answer, value, is_finite in zip(answers, values, finite, strict=True):
            if not is_finite:
                answer.finish_reason = FinishReason.ERROR
                answer.error_code, answer.error_message = NOT_FINITE
            elif self._kind is Kind.EMBED:
                answer.embedding = value
            else:
                answer.scores = value
        return answers

    def _forward(self, rows: Seq[Sequence]) -> Tensor:
        """Vectors or logits, [rows, size]."""
        shape = len(rows), max(map(_length, rows))
        ids = torch.full(shape, self._pad, dtype=torch.int64)
        mask, pooled, types = (torch.zeros_like(ids) for _ in range(3))
        for place, row in enumerate(rows):
            length, skip = _length(row), row.pooling.skip
            ids[place, :length] = torch.tensor(row.prompt_token_ids)
            mask[place, :length] = 1
            pooled[place, skip if skip < length else 0 : length] = 1
            if row.token_type_ids:
                types[place, :length] = torch.tensor(row.token_type_ids)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._takes_types:
            inputs["token_type_ids"] = types
        on_device = {name: each.to(self._device) for name, each in inputs.items()}
        packing = self._packing
        with nullcontext() if packing is None else packing.company([*map(_length, rows)]):
            found = self._task.run(on_device, pooled.to(self._device))
        self._memory.forget()
        return found

    def _try_model(self) -> Company:
        """Run what nobody asked for, so that nobody is the first to find out.

        Raises `ConfigError` if the longest text that the model's files allow does not run.
        """
        tokenizer, context = self._tokenizer, self._tokenizer.context_tokens
        try:
            self._forward([_text(tokenizer, context)])
        except (IndexError, RuntimeError, ValueError) as error:
            if ran_out_of_memory(error):
                why = "there is no memory for it"
            else:
                why = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"The model does not run a text of {context} tokens, which its files allow "
                f"({why}); set context_tokens to less."
            ) from error
        self._progress()
        texts = [_text(tokenizer, min(tried, context)) for tried in _TRIED]
        company = _company_of(self._forward, texts, self._task.model.dtype)
        # Beyond such a length the model works another way, and it is the longest row's that counts.
        switch = min(thresholds(self._task.model.config), default=math.inf)
        return replace(company, padded_tokens=min(company.padded_tokens, switch))

    def _try_packing(self) -> str:
        """Pack the model if its answers stay what they are, alone and in company; else say why it
        is not packed."""
        tokenizer, dtype = self._tokenizer, self._task.model.dtype
        texts = [_text(tokenizer, min(each, tokenizer.context_tokens)) for each in _PACKED_TRIED]
        wanted = torch.cat([self._forward([text]) for text in texts])
        plain, why = self._memory, ""
        for whole in (True, False):
            try:
                packing = Packing(self._task.model, tokenizer.context_tokens, whole=whole)
            except Unpackable as reason:
                why = str(reason)
                continue
            self._packing, self._memory = packing, Memory(self._task.model)
            try:
                found = torch.cat(
                    [*(self._forward([text]) for text in texts), self._forward(texts)]
                )
                moved = (found - wanted.repeat(2, 1)).norm(dim=1) / wanted.norm(dim=1).repeat(2)
                if (moved <= TOLERANCE[dtype]).all():
                    packing.keep()
                    self._memory = Memory(self._task.model)
                    return ""
                why = "its answers would be others"
            except Exception as error:  # of layers that were read wrongly, anything may come
                why = str(error) if isinstance(error, Unpackable) else "its layers ask for more"
            packing.undo()
            plain.forget()
            self._packing, self._memory = None, plain
        return f"not packed: {why}"


def encoder_fits(folder: Path, settings: ModelSettings) -> None:
    """Raises `ConfigError` for what can be seen without the weights."""
    read_card(folder, settings)
    task = Embedder if settings.kind is Kind.EMBED else Classifier
    check_fits(task.auto_class(read_json(folder / "config.json")), folder)


def _company_of(
    forward: Callable[[Seq[Sequence]], Tensor], texts: Seq[Sequence], dtype: torch.dtype
) -> Company:
    """In which company the first, shorter text has the answer that it has alone."""
    [alone] = forward(texts[:1])

    def is_same_beside(other: Sequence) -> bool:
        try:
            moved = forward([texts[0], other])[0] - alone
        except (IndexError, RuntimeError, ValueError):  # as of a decoder without a padding token
            return False
        return bool(moved.norm() <= TOLERANCE[dtype] * alone.norm())

    if is_same_beside(texts[1]):
        return Company(math.inf, equal_lengths=True)
    return Company(0, equal_lengths=is_same_beside(texts[0]))


def _passes(sequences: Seq[Sequence], company: Company, *, packs: bool) -> Iterator[list[Sequence]]:
    """Texts that may share a pass: packed so many, else of like length, so that padding stays below
    the half."""
    rows: list[Sequence] = []
    tokens = 0
    for each in sorted(sequences, key=_length):
        length, shortest = _length(each), _length((rows or [each])[0])
        if packs:
            joins = tokens + length <= _PASS_TOKENS
        else:
            joins = length.bit_length() == shortest.bit_length()
        if rows and not (joins and company.allows((shortest, length), 0)):
            yield rows
            rows, tokens = [], 0
        rows.append(each)
        tokens += length
    if rows:
        yield rows


def _text(tokenizer: Tokenizer, length: int) -> Sequence:
    """A text of so many tokens, with what the model expects around one."""
    ids = list(tokenizer.encode("a b " * length, max_tokens=length).ids)
    while 0 < len(ids) < length:  # blanks may be no tokens, and words one
        ids[len(ids) // 2 : len(ids) // 2] = [ids[len(ids) // 2]] * (length - len(ids))
    return Sequence(0, tuple(ids[:length]) or (0,) * length)


def _takes_types(model: Any) -> bool:
    """Whether the model tells the two texts of a pair apart by more than their places. (That of
    GPT-2 has the parameter, too, for something else.)"""
    has_types = (
        getattr(model.config, "type_vocab_size", 0) > 1 or model.config.model_type == "xlnet"
    )
    return has_types and "token_type_ids" in inspect.signature(model.forward).parameters


def _pad_token(config: Any) -> int:
    for each in (config, config.get_text_config()):
        if isinstance(each.pad_token_id, int):
            return each.pad_token_id
    return 0


def _length(sequence: Sequence) -> int:
    return len(sequence.prompt_token_ids)
