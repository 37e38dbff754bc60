"""Loading a model's folder through transformers, or saying in a sentence why that cannot be.

What a folder says of itself is compared with what it holds before any weight is read: the model is
built without memory (on torch's meta device), and its weights' names and shapes are those of the
files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from app.config.settings import ModelSettings
from app.engines.checkpoint.folder import stored_tensors
from app.engines.checkpoint.json_files import class_names
from app.engines.device import pick_dtype, ran_out_of_memory
from app.errors import ConfigError
from app.printable import in_a_line

_MASKS: Final = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""What older files keep beside their weights, and no model reads."""

_KINDS: Final[dict[Any, str]] = {
    AutoModel: "model for text",
    AutoModelForTextEncoding: "encoder of text",
    AutoModelForSequenceClassification: "classifier of text",
    AutoModelForCausalLM: "decoder",
    AutoModelForSeq2SeqLM: "encoder-decoder",
}

_WRITERS: Final = (AutoModelForCausalLM, AutoModelForSeq2SeqLM)

_SILENT: Final = (
    *("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForPreTraining"),
    *("ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction", "EncoderModel"),
)
"""Ends of the names of classes that generate no text."""


def load_model(
    auto_class: Any,
    folder: Path,
    dtype: str,
    device: torch.device,
    shrink: Callable[[PreTrainedModel], None] | None = None,
    unused: str | None = None,
) -> PreTrainedModel:
    """A model from a folder that `models.ensure_files` made ready, for inference.

    `auto_class` is one of transformers' Auto classes; `shrink` changes the model before it takes
    room on the device. Raises `ConfigError` if transformers does not know the model, if weights and
    configuration do not fit each other, or if there is no room; weights whose names begin with
    `unused` may be missing.
    """
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    check_fits(auto_class, folder)
    try:
        if device.type == "cuda":
            # Streams and pinned memory are made on the current device, wherever tensors are.
            torch.cuda.set_device(device.index or 0)
        model, report = auto_class.from_pretrained(
            folder,
            dtype=pick_dtype(dtype, device),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        _check_report(folder, model, report, unused)
        # Weights keep requires_grad: torch folds a strided batch into one matrix product only for
        # those, and otherwise repeats the output layer for each row of a prefill, 200 times slower.
        if shrink is not None:
            shrink(model)
        loaded: PreTrainedModel = model.eval().to(device)
        return loaded
    except ConfigError:
        raise
    except Exception as error:  # from anywhere in transformers, and it says little of the cause
        if ran_out_of_memory(error):
            raise ConfigError(
                f"there is no room for the weights in {folder} on {device}; take a smaller model, "
                "a shorter dtype, or another device."
            ) from error
        raise ConfigError(f"the model in {folder} cannot be loaded: {in_a_line(error)}.") from error


def check_fits(auto_class: Any, folder: Path) -> None:
    """Raise `ConfigError` if the folder's configuration is no such model's, or not its weights'.

    Reads no weights. Names that transformers changes while it loads are left to `load_model`.
    """
    config = read_config(folder)
    kind = config.model_type
    if type(config) not in auto_class._model_mapping:
        raise ConfigError(f"{folder} holds a {kind}, which is no {_KINDS[auto_class]}.")
    if auto_class in _WRITERS:
        _check_writes(folder, config)
    stored = stored_tensors(folder)
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except Exception as error:
        raise ConfigError(
            f"{folder / 'config.json'} describes no {kind} that can be built: {in_a_line(error)}."
        ) from error
    expected = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    for name, tensor in stored.items():
        shape = expected.get(name) or expected.get(prefix + name)
        if shape is None and name.startswith(prefix):
            shape = expected.get(name.removeprefix(prefix))
        if shape is not None and shape != tensor.shape:
            raise ConfigError(
                f"{folder}: weights and config.json do not belong together: {name} is "
                f"{list(tensor.shape)} in the files, and {list(shape)} by config.json."
            )


def writer_fits(folder: Path, settings: ModelSettings) -> None:
    """For the engine generate."""
    separate = getattr(read_config(folder), "is_encoder_decoder", False)
    check_fits(AutoModelForSeq2SeqLM if separate else AutoModelForCausalLM, folder)


def read_config(folder: Path) -> PreTrainedConfig:
    """Raises `ConfigError` for a config.json that transformers cannot read."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # validators of many kinds
        raise ConfigError(
            f"{folder / 'config.json'} cannot be read: {in_a_line(error)}."
        ) from error
    return config


def _check_writes(folder: Path, config: PreTrainedConfig) -> None:
    """Encoders and classifiers can be loaded as what they are not, and answer nonsense."""
    named = next(iter(class_names(config.architectures)), "")
    if named.endswith(_SILENT):
        raise ConfigError(
            f"{folder} holds a {named}, which generates no text; it may be for the engine encoder."
        )
    is_encoder = getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder
    if is_encoder and type(config) in AutoModelForMaskedLM._model_mapping:
        raise ConfigError(
            f"{folder} holds a {config.model_type} that is an encoder (is_decoder is false in "
            "config.json); use the engine encoder."
        )


def _check_report(
    folder: Path, model: PreTrainedModel, report: dict[str, Any], unused: str | None
) -> None:
    """Raise `ConfigError` unless each weight has found its place: what has none would be random, or
    would be left out in silence."""
    missing = sorted(report["missing_keys"])
    if unused is not None:
        missing = [name for name in missing if not name.startswith(unused)]
    if missing:
        raise ConfigError(
            f"{folder} lacks weights that its config.json asks for: {_few(missing)}; fetch or copy "
            "it again, or take the engine that fits it."
        )
    modules = {_numberless(name) for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    dropped = []
    for name in sorted(report["unexpected_keys"]):
        places = {
            _numberless(each).rpartition(".")[0] for each in (name, name.removeprefix(prefix))
        }
        if modules & places and not name.endswith(_MASKS):
            dropped.append(name)
    if dropped:
        raise ConfigError(
            f"{folder} has weights that its config.json leaves out: {_few(dropped)}; the two do "
            "not belong together."
        )


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
