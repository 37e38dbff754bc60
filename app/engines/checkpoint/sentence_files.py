"""What the files of sentence-transformers in a model's folder say of its vectors.

Read by all who count tokens as well as by the engine, so this imports no torch. What a file asks
for and nobody here does is refused by name: the vectors would be others, and nobody would know.
The files are those of sentence-transformers 1 to 5, which has renamed some of their keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from app.engines.checkpoint.json_files import load_json, read_json
from app.errors import ConfigError

POOLINGS: Final = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")
"""In the order in which a pooling of several concatenates them."""
LAYERS: Final = ("Dense", "LayerNorm", "Dropout", "Normalize")
"""Modules that may follow the pooling."""

_MODEL_FILES: Final = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_NEUTRAL: Final = {
    "model_args": {},
    "tokenizer_args": {},
    "config_args": {},
    "processing_kwargs": {},
    "mask_prompt": False,
    "transformer_task": "feature-extraction",
    "modality_config": {
        "text": {"method": "forward", "method_output_name": "last_hidden_state"},
    },
    "module_output_name": "token_embeddings",
    "model_type": "SentenceTransformer",
    "truncate_dim": None,
}
"""Keys that ask for nothing as long as they have this value."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A module behind the pooling."""

    name: str  #: one of `LAYERS`
    folder: Path
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    poolings: tuple[str, ...] = ("mean",)
    layers: tuple[Layer, ...] = ()
    include_prompt: bool = True  #: whether a prompt's own tokens are pooled with the text's
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


def read(folder: Path) -> SentenceFiles | None:
    """None if the folder has no such files. Raises `ConfigError` for what is not done here."""
    modules = load_json(folder / "modules.json", missing=None)
    model = next((name for name in _MODEL_FILES if (folder / name).is_file()), None)
    own = read_json(folder / model) if model else {}
    texts = read_json(folder / "config_sentence_transformers.json")
    if modules is None and not own and not texts:
        return None
    if model:
        _refuse_unknown(model, own, {"max_seq_length", "do_lower_case"})
    _refuse_unknown(
        "config_sentence_transformers.json",
        texts,
        {"__version__", "prompts", "default_prompt_name", "similarity_fn_name"},
    )
    poolings, include_prompt, layers = _modules(folder, modules or [])
    prompts = {name: text or "" for name, text in (texts.get("prompts") or {}).items()}
    default = texts.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ConfigError(
            f"config_sentence_transformers.json names the default prompt {default}, which is not "
            "among its prompts."
        )
    return SentenceFiles(
        poolings=poolings,
        layers=layers,
        include_prompt=include_prompt,
        max_seq_length=own.get("max_seq_length"),
        do_lower_case=bool(own.get("do_lower_case")),
        prompts=prompts,
        default_prompt_name=default,
    )


def _modules(
    folder: Path, modules: list[dict[str, Any]]
) -> tuple[tuple[str, ...], bool, tuple[Layer, ...]]:
    """Poolings, whether these include a prompt, and the layers behind them."""
    named = [(each["type"].rpartition(".")[2], folder / each["path"]) for each in modules]
    if strange := {name for name, _ in named} - {"Transformer", "Pooling", *LAYERS}:
        raise ConfigError(f"The engine encoder has no module {', '.join(sorted(strange))}.")
    names = [name for name, _ in named]
    if names and (names[0] != "Transformer" or names.count("Transformer") > 1):
        raise ConfigError("modules.json does not begin with its one Transformer.")
    if names and named[0][1] != folder:
        raise ConfigError(
            f"modules.json has the Transformer in {named[0][1].name}; move its files up, beside "
            "modules.json."
        )
    if names.count("Pooling") > 1 or "Pooling" in names[2:]:
        raise ConfigError("modules.json has Pooling in another place than behind the Transformer.")
    if "Pooling" not in names:
        if names[1:]:
            raise ConfigError(f"modules.json has {names[1]} and no Pooling.")
        return ("mean",), True, ()
    pooling = read_json(named[1][1] / "config.json")
    layers = tuple(Layer(name, at, read_json(at / "config.json")) for name, at in named[2:])
    return _poolings(pooling), bool(pooling.get("include_prompt", True)), layers


def _poolings(config: dict[str, Any]) -> tuple[str, ...]:
    """From a flag for each mode, as in pooling_mode_mean_tokens, or from the newer pooling_mode."""
    given = config.get("pooling_mode")
    if given is None:
        flags = [name for name, is_on in config.items() if "pooling_mode" in name and is_on]
        given = [flag.removeprefix("pooling_mode_") for flag in flags]
    elif isinstance(given, str):
        given = given.split("+")
    modes = {mode.removesuffix("_tokens").removesuffix("_token") for mode in given}
    if strange := modes - set(POOLINGS):
        raise ConfigError(
            f"The engine encoder pools by {', '.join(POOLINGS)}, not by "
            f"{', '.join(sorted(strange))}."
        )
    if not modes:
        raise ConfigError("The Pooling of modules.json names no mode.")
    return tuple(mode for mode in POOLINGS if mode in modes)


def _refuse_unknown(file: str, config: Mapping[str, Any], known: set[str]) -> None:
    for key, value in config.items():
        if key in known or value is None or (key in _NEUTRAL and value in (_NEUTRAL[key], {})):
            continue
        raise ConfigError(f"{file} asks for {key}, which the engine encoder does not do.")
