"""What is refused of a model's folder before any of it is loaded, in a sentence each.

Reads the JSON files and the heads of the weights, and never imports torch or transformers: the API
looks at its models, too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from app.engines.checkpoint.json_files import class_names, read_json
from app.engines.text.tokenizer_file import pieces_file
from app.errors import ConfigError

INDEX: Final = "model.safetensors.index.json"

_POINTER: Final = b"version https://git-lfs.github.com/spec/"

_OTHER_FORMATS: Final = {
    "model_index.json": "a pipeline of diffusers, which no engine runs",
    "params.json": "in the format of its authors; take the folder in Hugging Face's format",
    "*.gguf": "GGUF; give the file itself as the source",
    "*.onnx": "ONNX, which no engine runs; take the folder with safetensors weights",
    "tf_model.h5": "TensorFlow's, which no engine runs; take the folder with safetensors weights",
}
"""What a folder without config.json may be instead."""

_QUANTIZED: Final = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Files that say it outside of config.json."""

_PACKED_NAME: Final = re.compile(r"\.(qweight|qzeros|weight_packed|\w+_blocks|SCB|absmax)$")
_FULL_DTYPES: Final = {"F64", "F32", "F16", "BF16"}
_NEUTRAL_DTYPES: Final = {"I64", "I32", "BOOL"}
"""Tables and counters that models keep beside their weights."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What the head of a safetensors file says of one tensor."""

    dtype: str  #: in the format's own words, such as BF16
    shape: tuple[int, ...]


def check_config(folder: Path, *, full: bool) -> None:
    """Raise `ConfigError` unless config.json is a model's and, if `full` weights alone will do, one
    that our own engines may run."""
    _check_pointers(folder.glob("*.json"))
    config = read_json(folder / "config.json")
    adapter = read_json(folder / "adapter_config.json")
    if adapter:
        base = adapter.get("base_model_name_or_path")
        raise ConfigError(
            f"{folder} is an adapter ({adapter.get('peft_type', 'PEFT')}) for {base}, not a model; "
            "merge it into its base (merge_and_unload of peft) and save that, or name it as an "
            'adapter of a model with engine = "vllm".'
        )
    if not (folder / "config.json").is_file():
        for pattern, what in _OTHER_FORMATS.items():
            if any(folder.glob(pattern)):
                raise ConfigError(f"{folder} has no config.json: what it holds is {what}.")
        raise ConfigError(f"{folder} has no config.json; save the model with save_pretrained.")
    if not full:
        return
    if method := _quantization(folder, config):
        raise ConfigError(
            f"the weights in {folder} are quantized ({method}), which this engine does not run; "
            'use engine = "vllm", or a folder with full weights.'
        )
    _check_code(folder, config)


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    """Code that a folder brings is never run: transformers' own must do."""
    kind = config.get("model_type")
    own = [f"{kind} (model_type)"] if str(kind) not in _known_names() else []
    if config.get("auto_map") and not own:
        named = class_names(config.get("architectures"))
        own = [each for each in named if each not in _known_names()]
    if not own:
        return
    file = folder / "config.json"
    if config.get("auto_map"):
        raise ConfigError(
            f"{file} asks to run code of its own (auto_map) for {', '.join(own)}, which Gristmill "
            "never does; take a model that transformers knows."
        )
    if kind is None:
        raise ConfigError(f"{file} names no model_type; save the model with save_pretrained.")
    raise ConfigError(
        f"the installed transformers does not know the architecture {kind} that {file} names; "
        'install a newer transformers, or use engine = "vllm".'
    )


@functools.cache
def _known_names() -> frozenset[str]:
    """Model types and classes that transformers maps to code of its own; from the source of the
    mappings, because to import them takes seconds and hundreds of megabytes."""
    found = find_spec("transformers")
    assert found is not None and found.origin is not None
    sources = (Path(found.origin).parent / "models" / "auto").glob("*auto*.py")
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    return frozenset(re.findall(r'"([\w.-]+)"', text))


def _quantization(folder: Path, config: dict[str, Any]) -> str | None:
    """How the weights are quantized, by what the files say."""
    for where in (config, config.get("text_config"), config.get("llm_config")):
        for key in ("quantization_config", "compression_config"):
            said = where.get(key) if isinstance(where, dict) else None
            if isinstance(said, dict) and said:
                return str(said.get("quant_method") or said.get("quant_algo") or key)
    for name, method in _QUANTIZED.items():
        if (folder / name).is_file():
            return method
    return None


def check_tokenizer(folder: Path) -> None:
    if (folder / "tokenizer.json").is_file() or pieces_file(folder):
        return
    others = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "source.spm")
    found = [name for name in others if (folder / name).is_file()]
    instead = f"only {found[0]}" if found else "nor another tokenizer's file"
    raise ConfigError(
        f"{folder} has no tokenizer.json, {instead}; write it with transformers: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
    )


def check_weights(folder: Path, *, full: bool) -> None:
    """Raise `ConfigError` unless every safetensors file is whole and, if `full`, not quantized."""
    tensors = stored_tensors(folder)
    for name, tensor in tensors.items() if full else ():
        packed = _PACKED_NAME.search(name)
        if packed or tensor.dtype not in _FULL_DTYPES | _NEUTRAL_DTYPES:
            what = packed[1] if packed else tensor.dtype
            raise ConfigError(
                f"the weights in {folder} are quantized ({name} is {what}), which this engine does "
                'not run; use engine = "vllm", or a folder with full weights.'
            )


def weight_patterns(folder: Path) -> list[str]:
    """What to download of the weights, by the files that are there: not the same twice, as authors
    keep them in several formats side by side."""
    names = sorted(_shards(folder)) or ["model.safetensors"]
    return [*names, "[0-9]*_*/*.safetensors"]  # of sentence-transformers' modules


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model."""
    names = sorted(_shards(folder))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}; fetch or copy it again.")
    if names:
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickled:
        raise ConfigError(
            f"{folder} has its weights in {pickled[0].name}, and pickled weights are not loaded: "
            "they may run code; save the model with save_pretrained, which writes safetensors."
        )
    raise ConfigError(f"{folder} lacks model.safetensors; fetch or copy it again.")


def _shards(folder: Path) -> set[str]:
    index = read_json(folder / INDEX).get("weight_map", {})
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ConfigError(f"the weight_map of {folder / INDEX} does not name files.")
    return set(index.values())


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the model, by name; reads no more than the heads of the files."""
    files = weight_files(folder)
    _check_pointers(files)
    return {name: tensor for file in files for name, tensor in _head(file).items()}


def _head(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="numpy") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(part.get_dtype(), tuple(part.get_shape()))
                for name, part in parts.items()
            }
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
    except SafetensorError as error:
        raise ConfigError(
            f"{file} is no whole safetensors file ({error}); fetch or copy it again."
        ) from None


def _check_pointers(files: Iterable[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ConfigError(
                    f"{file} is a pointer of Git LFS and not the file itself; run `git lfs pull` "
                    f"in {file.parent}."
                )
