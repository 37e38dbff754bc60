"""Texts, or pairs of them, to a score for each class: classifiers and cross-encoders."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from app.config.settings import ModelSettings
from app.engines.checkpoint.json_files import read_json
from app.engines.checkpoint.loading import load_model
from app.errors import ConfigError
from app.jobs import PoolingParams

Activation = Callable[[Tensor], Tensor]
"""Logits [rows, classes] → scores."""


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _identity(logits: Tensor) -> Tensor:
    return logits


_BY_PROBLEM: Final[dict[str, Activation]] = {
    "single_label_classification": _softmax,
    "multi_label_classification": torch.sigmoid,
    "regression": _identity,
}
"""By the `problem_type` of config.json."""
_BY_NAME: Final[dict[str, Activation]] = {
    "torch.nn.modules.linear.Identity": _identity,
    "torch.nn.modules.activation.Sigmoid": torch.sigmoid,
    "torch.nn.modules.activation.Tanh": torch.tanh,
    "torch.nn.modules.activation.Softmax": _softmax,
}
"""By the names that sentence-transformers' cross-encoders write into config.json."""


class Classifier:
    def __init__(self, folder: Path, settings: ModelSettings, device: torch.device) -> None:
        config = read_json(folder / "config.json")
        self._activation = _activation(config)
        self.model: Any = load_model(self.auto_class(config), folder, settings.dtype, device)

    @staticmethod
    def auto_class(config: dict[str, Any]) -> Any:
        return AutoModelForSequenceClassification

    def run(self, inputs: dict[str, Tensor], pooled: Tensor) -> Tensor:
        """(inputs, not used) → logits [rows, classes]."""
        logits: Tensor = self.model(**inputs).logits.float()
        return logits

    def finish(self, logits: Tensor, params: Seq[PoolingParams]) -> list[list[float]]:
        """Scores of each row, or its logits if these are asked for."""
        given = self._activation(logits).tolist(), logits.tolist()
        return [given[0 if each.use_activation else 1][row] for row, each in enumerate(params)]


def _activation(config: dict[str, Any]) -> Activation:
    """As the configuration says; where it does not, as transformers and vLLM take it."""
    named = (config.get("sentence_transformers") or {}).get("activation_fn")
    named = named or config.get("sbert_ce_default_activation_function")
    if named is not None:
        if named not in _BY_NAME:
            raise ConfigError(f"The engine encoder has no activation {named} for scores.")
        return _BY_NAME[named]
    problem = config.get("problem_type")
    if problem is not None:
        if problem not in _BY_PROBLEM:
            raise ConfigError(f"The engine encoder knows no problem_type {problem}.")
        return _BY_PROBLEM[problem]
    classes = len(config.get("id2label") or ()) or config.get("num_labels", 2)
    return torch.sigmoid if classes == 1 else _softmax
