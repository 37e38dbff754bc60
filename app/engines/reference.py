"""What an engine is held against: transformers itself, in float32, one prompt at a time.

Text comes from the model's own `generate`; vectors and scores from its plain forward pass, under
the head that its files describe. Nothing is packed, padded, batched or kept from one prompt to the
next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)

from app.config.settings import ModelSettings
from app.engines.base import Generation, Sequence, TokenLogprob, finite
from app.engines.checkpoint.loading import load_model
from app.engines.device import give_back_memory, pick_device, ran_out_of_memory, use_threads
from app.engines.encoder.classifier import Classifier
from app.engines.encoder.embedder import Embedder
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import Tokenizer
from app.errors import EngineError, OutOfMemory
from app.jobs import FinishReason, Kind
from app.threads import place_of

DTYPE: Final = "float32"


class Reference:
    """A model of a folder with full weights. Use it in a `with`: it gives back its memory."""

    def __init__(
        self, folder: Path, settings: ModelSettings, tokenizer: Tokenizer, device: str, threads: int
    ) -> None:
        """Raises `ConfigError` if transformers cannot load it."""
        self._device = pick_device(device)
        self._tokenizer = tokenizer
        use_threads(threads)
        plain = settings.model_copy(update={"dtype": DTYPE})
        self._task: Embedder | Classifier | None = None
        match settings.kind:
            case Kind.GENERATE | Kind.TRANSLATE:
                separate = tokenizer.separate_output
                kind = AutoModelForSeq2SeqLM if separate else AutoModelForCausalLM
                self._model: Any = load_model(kind, folder, DTYPE, self._device)
                self._config, self._stops = _config_of(self._model, folder, settings)
            case Kind.EMBED:
                self._task = Embedder(folder, plain, self._device)
            case _:
                self._task = Classifier(folder, plain, self._device)

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._model = self._task = None
        give_back_memory(self._device)

    def answer(self, sequence: Sequence) -> Generation:
        """Greedy text with each token's log-probability and the likeliest in its place, or a
        vector, or scores. Raises `OutOfMemory`."""
        try:
            with torch.inference_mode():
                return self._pool(sequence) if self._task else self._write(sequence)
        except Exception as error:
            if not ran_out_of_memory(error):  # from anywhere in transformers: it may quote data
                raise EngineError(
                    f"transformers cannot run this model alone: {place_of(error)}."
                ) from error
        give_back_memory(self._device)
        raise OutOfMemory("There is no memory for transformers in float32 beside what runs here.")

    def _write(self, sequence: Sequence) -> Generation:
        params, prompt = sequence.params, sequence.prompt_token_ids
        assert params is not None
        ids = torch.tensor([prompt], device=self._device)
        given = {
            name: value
            for name in ("decoder_start_token_id", "forced_bos_token_id")
            if (value := getattr(params, name)) is not None
        }
        out = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self._config,
            max_new_tokens=params.max_tokens,
            eos_token_id=sorted(self._tokenizer.eos_token_ids) or None,
            output_logits=True,
            return_dict_in_generate=True,
            **self._stops,
            **given,
        )
        tokens = out.sequences[0, -len(out.logits) :]
        logprobs = torch.stack(out.logits, dim=1)[0].float().log_softmax(-1)
        own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        best = [(each.tolist()) for each in logprobs.max(-1)]
        output = Output(params, self._tokenizer, prompt)
        for token in tokens.tolist():
            output.append(token)
        return Generation(
            sequence.id,
            FinishReason.STOP,
            token_ids=output.token_ids,
            text=output.text,
            logprobs=[
                TokenLogprob(token, finite(logprob), ((likeliest, finite(most)),))
                for token, logprob, most, likeliest in zip(
                    output.token_ids, own, *best, strict=True
                )
            ],
            input_tokens=len(prompt),
        )

    def _pool(self, sequence: Sequence) -> Generation:
        assert self._task is not None
        ids = torch.tensor([sequence.prompt_token_ids], device=self._device)
        pooled = torch.ones_like(ids)
        if sequence.pooling.skip < ids.shape[1]:
            pooled[:, : sequence.pooling.skip] = 0
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if sequence.token_type_ids:
            inputs["token_type_ids"] = torch.tensor([sequence.token_type_ids], device=self._device)
        [values] = self._task.finish(self._task.run(inputs, pooled).cpu(), [sequence.pooling])
        answer = Generation(sequence.id, FinishReason.STOP, input_tokens=ids.shape[1])
        if isinstance(self._task, Embedder):
            answer.embedding = values
        else:
            answer.scores = values
        return answer


def _config_of(
    model: Any, folder: Path, settings: ModelSettings
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The model's own generation settings without draws and beams, or none if the settings say so;
    and what `generate` wants beside them for stop strings."""
    own = model.generation_config
    if settings.generation_config == "none":
        kept = {name: getattr(own, name, None) for name in _STARTS} | {"do_sample": False}
        return GenerationConfig(**kept, pad_token_id=_pad(own)), {}  # type: ignore[no-untyped-call]
    plain = {"do_sample": False, "num_beams": 1, "max_length": None, "pad_token_id": _pad(own)}
    for name, value in (plain | dict.fromkeys(_OF_DRAWS)).items():
        setattr(own, name, value)
    stops = {"tokenizer": AutoTokenizer.from_pretrained(folder)} if own.stop_strings else {}
    return own, stops


_STARTS: Final = ("bos_token_id", "decoder_start_token_id")
_OF_DRAWS: Final = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
"""What `generate` warns of where it does not draw."""


def _pad(config: Any) -> int:
    """Any id will do: nothing is padded."""
    return 0 if config.pad_token_id is None else int(config.pad_token_id)
