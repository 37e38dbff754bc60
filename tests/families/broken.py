"""Model folders with something wrong about them, and what is said of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

WEIGHTS: Final = "model.safetensors"


@dataclass(frozen=True)
class Broken:
    """`spoil` changes a folder that holds a tiny Llama."""

    name: str  #: for people
    spoil: Callable[[Path], object]
    says: str  #: a part of the sentence, a regular expression
    early: bool = True  #: whether it is seen before any weight is read


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def write_json(name: str, content: Any) -> Callable[[Path], object]:
    return write(name, json.dumps(content).encode())


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def rename(name: str, to: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder / to)


def truncate(name: str, to: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:to])


def configure(**fields: Any) -> Callable[[Path], object]:
    """Change fields of config.json; None removes one."""

    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text()) | fields
        kept = {name: value for name, value in config.items() if value is not None}
        file.write_text(json.dumps(kept))

    return spoil


def reweigh(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Change the weights by name."""

    def spoil(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def both(*spoils: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [spoil(folder) for spoil in spoils]


_QUERY: Final = "model.layers.0.self_attn.q_proj"
_POINTER: Final = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
_ADAPTER: Final = {"peft_type": "LORA", "base_model_name_or_path": "b"}
_INDEX: Final = "model.safetensors.index.json"


def _to_fp8(weights: dict[str, torch.Tensor]) -> None:
    weights[f"{_QUERY}.weight"] = weights[f"{_QUERY}.weight"].to(torch.float8_e4m3fn)


def _to_gptq(weights: dict[str, torch.Tensor]) -> None:
    weights[f"{_QUERY}.qweight"] = weights.pop(f"{_QUERY}.weight").to(torch.int32)


def quantized(method: str, **more: Any) -> Callable[[Path], object]:
    return configure(quantization_config={"quant_method": method, **more})


BROKEN: Final = [
    Broken("GPTQ", quantized("gptq", bits=4), r"quantized \(gptq\).*engine = \"vllm\""),
    Broken("GPTQ, said in a file beside", write_json("quantize_config.json", {"bits": 4}), "gptq"),
    Broken("GPTQ, said nowhere", reweigh(_to_gptq), r"quantized \(.*q_proj\.qweight is qweight\)"),
    Broken("AWQ", quantized("awq", bits=4), r"quantized \(awq\)"),
    Broken("FP8", quantized("fp8"), r"quantized \(fp8\)"),
    Broken("FP8, said nowhere", reweigh(_to_fp8), r"quantized \(.*q_proj\.weight is F8_E4M3\)"),
    Broken("MXFP4", quantized("mxfp4"), r"quantized \(mxfp4\)"),
    Broken("bitsandbytes", quantized("bitsandbytes", load_in_4bit=True), "bitsandbytes"),
    Broken("weights cut off", truncate(WEIGHTS, 20_000), "no whole safetensors file.*fetch or"),
    Broken("weights empty", truncate(WEIGHTS, 0), "no whole safetensors file"),
    Broken("weights are a web page", write(WEIGHTS, b"<!DOCTYPE html>"), "no whole safetensors"),
    Broken("weights are a Git LFS pointer", write(WEIGHTS, _POINTER), "pointer.*`git lfs pull`"),
    Broken("tokenizer is a Git LFS pointer", write("tokenizer.json", _POINTER), "git lfs pull"),
    Broken("pickled weights", rename(WEIGHTS, "pytorch_model.bin"), "pickled weights are not"),
    Broken("no weights", remove(WEIGHTS), r"lacks model\.safetensors"),
    Broken(
        "a part of the weights is missing",
        write_json(_INDEX, {"weight_map": {"a": WEIGHTS, "b": "model-2.safetensors"}}),
        r"lacks model-2\.safetensors",
    ),
    Broken("an index that names no files", write_json(_INDEX, {"weight_map": [1]}), "weight_map"),
    Broken(
        "an adapter without its base",
        both(
            write_json("adapter_config.json", _ADAPTER),
            remove("config.json"),
        ),
        r"adapter \(LORA\) for b, not a model; merge it",
    ),
    Broken("no config.json", remove("config.json"), r"has no config\.json"),
    Broken(
        "a pipeline of diffusers",
        both(remove("config.json"), write_json("model_index.json", {})),
        "pipeline of diffusers",
    ),
    Broken("config.json is no JSON", write("config.json", b"{"), r"config\.json is not JSON"),
    Broken("config.json is a list", write("config.json", b"[]"), "does not hold a JSON object"),
    Broken("no model_type", configure(model_type=None), "names no model_type"),
    Broken("unknown architecture", configure(model_type="marvin"), "architecture marvin"),
    Broken(
        "code of its own (trust_remote_code)",
        configure(model_type="marvin", auto_map={"AutoModelForCausalLM": "modeling.Marvin"}),
        "asks to run code of its own",
    ),
    Broken(
        "code of its own under a known name",
        configure(architectures=["Marvin"], auto_map={"AutoModelForCausalLM": "modeling.Marvin"}),
        r"code of its own \(auto_map\) for Marvin",
    ),
    Broken("config.json of wrong values", configure(num_hidden_layers="two"), r"config\.json"),
    Broken("config.json of odd sizes", configure(num_attention_heads=5), r"config\.json|together"),
    Broken("no tokenizer", remove("tokenizer.json"), r"has no tokenizer\.json"),
    Broken(
        "another format of tokenizer",
        rename("tokenizer.json", "tokenizer.model"),
        r"only tokenizer\.model; write it with transformers",
    ),
    Broken("tokenizer.json is no JSON", write("tokenizer.json", b"{"), r"tokenizer\.json"),
    Broken("tokenizer_config.json is a list", write("tokenizer_config.json", b"[]"), "JSON object"),
    Broken(
        "weights wider than config.json",
        configure(intermediate_size=48),
        r"do not belong together: .* is \[32, 64\] in the files, and \[32, 48\] by config\.json",
    ),
    Broken(
        "more layers in weights than in config.json",
        configure(num_hidden_layers=1),
        r"weights that its config\.json leaves out: model\.layers\.1",
        early=False,
    ),
    Broken(
        "fewer layers in weights than in config.json",
        configure(num_hidden_layers=3),
        r"lacks weights that its config\.json asks for: model\.layers\.2.* and \d more",
        early=False,
    ),
    Broken(
        "biases that config.json does not know",
        reweigh(lambda weights: weights.update({f"{_QUERY}.bias": torch.zeros(32)})),
        r"config\.json leaves out: .*q_proj\.bias",
        early=False,
    ),
    Broken(
        "a weight is missing",
        reweigh(lambda weights: weights.pop(f"{_QUERY}.weight")),
        r"lacks weights that its config\.json asks for: .*q_proj\.weight",
        early=False,
    ),
    Broken(
        "a classifier",
        configure(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification, which generates no text",
    ),
    Broken(
        "a model for images",
        configure(model_type="vit", architectures=["ViTModel"]),
        "holds a vit, which is no decoder",
    ),
]
