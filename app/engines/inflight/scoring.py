"""Log-probabilities of a prompt's own tokens.

A prompt whose tokens are to be scored is computed apart from the step that it is due in, in pieces
whose logits are looked at; what is left for the step is the last token, whose output is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from app.engines.base import LEAST_LOGPROB, TokenLogprob
from app.engines.inflight.attention import Packed, pack
from app.engines.inflight.scheduler import Row, Segment

PIECE: Final = 64
"""Tokens whose logits are held at once, in float32 over the whole vocabulary."""


def is_due(row: Row) -> bool:
    """Whether tokens of its prompt are still to be scored."""
    wanted = row.params.prompt_logprobs is not None
    return wanted and _num_scored(row) < len(row.sequence.prompt_token_ids) - 1


def split(segments: Seq[Segment]) -> tuple[list[Segment], list[Segment]]:
    """What of a step's segments is to be scored, and what is left for the step."""
    scored, left = [], []
    for segment in segments:
        end = segment.start + segment.count
        last = min(end, len(segment.row.sequence.prompt_token_ids) - 1)
        if is_due(segment.row) and _num_scored(segment.row) < last > segment.start:
            scored.append(Segment(segment.row, segment.start, last - segment.start))
            if last < end:
                left.append(Segment(segment.row, last, end - last))
        else:
            left.append(segment)
    return scored, left


def score(segment: Segment, tables: np.ndarray, logits_of: Callable[[Packed], Tensor]) -> bool:
    """Compute a stretch of a prompt and note how likely the tokens were that followed; whether all
    that was computed is a number."""
    row = segment.row
    prompt, known = row.sequence.prompt_token_ids, row.generation.prompt_logprobs or []
    with torch.inference_mode():
        for piece in _pieces(segment):
            packed = replace(pack([piece], tables), ends=np.arange(piece.count))
            logprobs = torch.log_softmax(logits_of(packed).float(), dim=-1).clamp_(LEAST_LOGPROB)
            if logprobs.isnan().any():
                return False
            found = _likely(logprobs, prompt[piece.start + 1 :], row.params.prompt_logprobs or 0)
            known += found[max(0, len(known) - piece.start) :]
    row.generation.prompt_logprobs = known
    return True


def _num_scored(row: Row) -> int:
    return len(row.generation.prompt_logprobs or ())


def _pieces(segment: Segment) -> Iterator[Segment]:
    for start in range(0, segment.count, PIECE):
        count = min(PIECE, segment.count - start)
        yield Segment(segment.row, segment.start + start, count)


def _likely(logprobs: Tensor, followed_by: Seq[int], k: int) -> list[TokenLogprob]:
    """[places, vocab] and the tokens that came → each of them, with the k likeliest there."""
    came = torch.tensor(followed_by[: len(logprobs)], device=logprobs.device)
    values, ids = logprobs.topk(min(k, logprobs.shape[1]))
    columns = came, logprobs.gather(1, came[:, None])[:, 0], ids, values
    return [
        TokenLogprob(token, logprob, tuple(zip(top, best, strict=True)))
        for token, logprob, top, best in zip(*(each.tolist() for each in columns), strict=True)
    ]
