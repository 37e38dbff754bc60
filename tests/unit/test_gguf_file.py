"""A GGUF file becomes the model and the tokenizer that it was written from, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedModel

from app.config.settings import ModelSettings
from app.engines.checkpoint.folder import stored_tensors
from app.engines.checkpoint.gguf_file import convert
from app.engines.checkpoint.models import ensure_files
from app.engines.text.tokenizer import FileTokenizer, Tokenizer
from app.errors import ConfigError
from app.jobs import Kind
from tests.families.tiny import CONTEXT, Family

MERGES = ["1 2", "12 3", "123 4", "Ġ t", "h e", "Ġt he"]
LETTERS = sorted(ByteLevel.alphabet())
TOKENS = [*LETTERS, *(merge.replace(" ", "") for merge in MERGES), "<begin>", "<end>", "<turn>"]
BEGIN, END, TURN = range(len(TOKENS) - 3, len(TOKENS))
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
SIZES = {"vocab_size": len(TOKENS), "tie_word_embeddings": False}

FAMILIES = {
    "llama": Family("llama", SIZES),
    "qwen2": Family("qwen2", SIZES),
    "qwen3": Family("qwen3", SIZES | {"tie_word_embeddings": True}),
}
"""By GGUF's names of their architectures."""


class Source:
    """A tiny model, and the GGUF file that is written of it."""

    def __init__(self, architecture: str, file: Path) -> None:
        torch.manual_seed(3)
        config = FAMILIES[architecture].config()
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.copy_((weight + 0.2 * torch.randn_like(weight)).half())
        self.architecture, self.file = architecture, file
        self.metadata: dict[str, int | float | str] = {}  #: beside the usual, or in its place
        self.tensors: dict[str, np.ndarray] = {}
        self.quantization: GGMLQuantizationType | None = None
        self.pre = "llama-bpe"

    def write(self) -> Path:
        writer = GGUFWriter(self.file, self.architecture)
        config = self.model.config
        sizes = {
            "context_length": CONTEXT,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": config.head_dim if hasattr(config, "head_dim") else 16,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": 10_000.0,
        }
        for name, value in (sizes | self.metadata).items():
            match value:
                case str():
                    writer.add_string(f"{self.architecture}.{name}", value)
                case int():
                    writer.add_uint32(f"{self.architecture}.{name}", value)
                case float():
                    writer.add_float32(f"{self.architecture}.{name}", value)
        self._write_tokenizer(writer)
        for name, weight in (self._renamed() | self.tensors).items():
            if self.quantization is not None and weight.ndim > 1:
                blocks = gguf.quantize(weight, self.quantization)
                writer.add_tensor(name, blocks, raw_dtype=self.quantization)
            else:
                writer.add_tensor(name, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self.file

    def _write_tokenizer(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types(
            [3 if token.startswith("<") and len(token) > 1 else 1 for token in TOKENS]
        )
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(BEGIN)
        writer.add_eos_token_id(END)
        writer.add_eot_token_id(TURN)
        writer.add_add_bos_token(True)
        writer.add_chat_template(TEMPLATE)

    def _renamed(self) -> dict[str, np.ndarray]:
        """The weights by the names that the gguf package has for transformers'."""
        kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(kind, self.model.config.num_hidden_layers)
        heads = {"q_proj": 4, "k_proj": 2}
        found: dict[str, np.ndarray] = {}
        for name, tensor in self.model.state_dict().items():
            weight = tensor.numpy()
            if name == "lm_head.weight" and self.model.config.tie_word_embeddings:
                continue
            part = name.split(".")[-2]
            if self.architecture == "llama" and part in heads:  # as llama.cpp pairs rows
                halves = weight.reshape(heads[part], 2, -1, *weight.shape[1:])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            to = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert to is not None, name
            found[to] = weight
        return found


@pytest.fixture
def llama(tmp_path: Path) -> Source:
    return Source("llama", tmp_path / "tiny.gguf")


def converted(source: Source) -> tuple[PreTrainedModel, Tokenizer]:
    folder = source.file.parent / "converted"
    folder.mkdir()
    convert(source.write(), folder)
    settings = ModelSettings(source=str(folder), kind=Kind.GENERATE, engine="inflight")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, FileTokenizer(folder, settings)


def assert_alike(
    model: PreTrainedModel, expected: PreTrainedModel, tolerance: float = 1e-3
) -> None:
    tokens = torch.arange(60)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            model(tokens).logits, expected(tokens).logits, atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_model_is_the_one_that_the_file_was_written_from(
    architecture: str, tmp_path: Path
) -> None:
    source = Source(architecture, tmp_path / "tiny.gguf")

    model, _ = converted(source)

    assert_alike(model, source.model)


def test_quantized_weights_are_expanded(llama: Source) -> None:
    # given a model whose weights are what 8 bits leave of them
    llama.quantization = GGMLQuantizationType.Q8_0
    with torch.no_grad():
        for weight in llama.model.parameters():
            if weight.ndim > 1:
                blocks = gguf.quantize(weight.numpy(), llama.quantization)
                weight.copy_(torch.from_numpy(gguf.dequantize(blocks, llama.quantization)))

    model, _ = converted(llama)

    assert_alike(model, llama.model, tolerance=0.02)  # float16 rounds them once more


def test_weights_that_do_not_fit_float16_are_stored_as_float32(llama: Source) -> None:
    with torch.no_grad():
        llama.model.model.embed_tokens.weight[0, 0] = 1e6

    model, _ = converted(llama)

    assert_alike(model, llama.model)
    dtypes = {each.dtype for each in stored_tensors(llama.file.parent / "converted").values()}
    assert dtypes == {"F32"}


def test_factors_of_rotary_frequencies_are_those_of_the_file(llama: Source) -> None:
    # given what files of Llama 3 have for its rope
    factors = np.array([1, 1, 1, 2, 3, 4, 8, 8], np.float32)
    llama.tensors["rope_freqs.weight"] = factors
    llama.model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)

    model, _ = converted(llama)

    assert_alike(model, llama.model)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [("llama-bpe", ["123", "4"]), ("qwen2", ["1", "2", "3", "4"]), ("gpt-2", ["1234"])],
)
def test_the_tokenizer_splits_as_the_file_says(llama: Source, pre: str, pieces: list[str]) -> None:
    llama.pre = pre

    _, tokenizer = converted(llama)

    begin, *ids = tokenizer.encode_text("1234 the")
    assert begin == BEGIN
    assert [TOKENS[token] for token in ids] == [*pieces, "Ġthe"]
    assert tokenizer.decode(ids) == "1234 the"
    assert tokenizer.eos_token_ids == {END, TURN}
    assert tokenizer.template is not None
    assert tokenizer.template.source == TEMPLATE


def spoil_metadata(source: Source) -> None:
    source.metadata["attention.sliding_window"] = 16


def spoil_scaling(source: Source) -> None:
    source.metadata |= {"rope.scaling.type": "su", "rope.scaling.factor": 2.0}


def spoil_tensor(source: Source) -> None:
    source.tensors["blk.0.attn_sinks.weight"] = np.zeros(4, np.float32)


def spoil_split(source: Source) -> None:
    source.pre = "marvin"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_metadata, r"says attention\.sliding_window, which is not read here"),
        (spoil_scaling, "scales positions by su"),
        (spoil_tensor, r"not known here: blk\.0\.attn_sinks\.weight"),
        (spoil_split, "splits text as marvin, which is not known here"),
    ],
)
def test_what_the_file_says_and_is_not_read_is_refused_by_name(
    llama: Source, tmp_path: Path, spoil: Any, says: str
) -> None:
    spoil(llama)

    with pytest.raises(ConfigError, match=says):
        convert(llama.write(), tmp_path)


def test_a_file_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(ConfigError, match=r"the architecture gemma2 are not read.*safetensors"):
        convert(tmp_path / "x.gguf", tmp_path)


def test_a_file_that_is_cut_off_is_refused(llama: Source, tmp_path: Path) -> None:
    file = llama.write()
    file.write_bytes(file.read_bytes()[:20_000])

    with pytest.raises(ConfigError, match=r"tiny\.gguf is no whole GGUF file"):
        convert(file, tmp_path)


def test_a_gguf_file_is_a_source_like_a_folder_and_is_converted_once(
    llama: Source, tmp_path: Path
) -> None:
    settings = ModelSettings(
        source=str(llama.write()), kind=Kind.GENERATE, engine="inflight", context_tokens=CONTEXT
    )
    said: list[str] = []

    folders = {ensure_files("m", settings, tmp_path / "cache", said.append) for _ in range(2)}

    assert len(folders) == 1
    assert said == ["converting tiny.gguf to safetensors, once"]
    model = AutoModelForCausalLM.from_pretrained(folders.pop(), dtype=torch.float32).eval()
    assert_alike(model, llama.model)
