"""From vectors and scores to bodies of answers, in the shapes of OpenAI, vLLM and Jina. Pure."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any

from app.engines.base import Generation
from app.jobs import Usage
from app.requests.classification import ClassifyBody
from app.requests.embedding import EmbeddingBody
from app.requests.pooled import PooledBody
from app.requests.scoring import RerankBody


def pooled_answer(
    body: PooledBody,
    generations: Sequence[Generation],
    counted: Usage,
    *,
    job_id: str,
    model: str,
    created: int,
    labels: Sequence[str],
) -> dict[str, Any]:
    """`labels` are the names of a classifier's classes."""
    usage = {"prompt_tokens": counted.input_tokens, "total_tokens": counted.total_tokens}
    match body:
        case EmbeddingBody(encoding_format=encoding):
            data = [
                {"object": "embedding", "index": i, "embedding": _vector(each, encoding)}
                for i, each in enumerate(generations)
            ]
            return {"object": "list", "model": model, "data": data, "usage": usage}
        case RerankBody():
            return {
                "id": f"rerank-{job_id}",
                "object": "list",
                "model": model,
                "results": _ranked(body, generations),
                "usage": usage,
            }
        case ClassifyBody(use_activation=active):
            name = "classify"
            data = [_classes(i, each, labels, active) for i, each in enumerate(generations)]
        case _:
            name = "score"
            data = [_scored(i, each) for i, each in enumerate(generations)]
    return {
        "id": f"{name}-{job_id}",
        "object": "list",
        "created": created,
        "model": model,
        "data": data,
        "usage": usage,
    }


def _vector(answer: Generation, encoding: str) -> list[float] | str:
    vector = answer.embedding or []
    if encoding == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _classes(
    index: int, answer: Generation, labels: Sequence[str], is_active: bool
) -> dict[str, Any]:
    """The likeliest class, and the numbers of all: in the model's order, and by label."""
    scores = answer.scores or []
    named = {_label(labels, place): score for place, score in enumerate(scores)}
    return {
        "index": index,
        "object": "classification",
        "label": max(named, key=lambda label: named[label], default=None),
        "probs" if is_active else "logits": scores,
        "num_classes": len(scores),
        "scores": named,
    }


def _label(labels: Sequence[str], place: int) -> str:
    return labels[place] if place < len(labels) else f"LABEL_{place}"


def _ranked(body: RerankBody, generations: Sequence[Generation]) -> list[dict[str, Any]]:
    """Best first; of equals the earlier."""
    texts = body.texts
    scored = [(_score(each), index) for index, each in enumerate(generations)]
    scored.sort(key=lambda it: (-it[0], it[1]))
    results = []
    for score, index in scored[: body.top_n or None]:
        result: dict[str, Any] = {"index": index, "relevance_score": score}
        if body.return_documents:
            result["document"] = {"text": texts[index]}
        results.append(result)
    return results


def _scored(index: int, answer: Generation) -> dict[str, Any]:
    return {"index": index, "object": "score", "score": _score(answer)}


def _score(answer: Generation) -> float:
    return answer.scores[0] if answer.scores else 0.0
