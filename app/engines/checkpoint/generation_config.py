"""What a model's own generation_config.json says of generating: obeyed, or refused by name.

Pure but for reading the file. Every field that transformers knows is in one of the tables here, so
none is dropped in silence; fields that it does not know do nothing there either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from app.config.settings import ModelSettings
from app.engines.checkpoint.json_files import read_json
from app.errors import ConfigError
from app.jobs import SamplingParams

FILE: Final = "generation_config.json"

OBEYED: Final = frozenset(
    {
        *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"),
        *("forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens"),
        *("no_repeat_ngram_size", "stop_strings", "do_sample", "temperature", "top_k", "top_p"),
        *("min_p", "repetition_penalty", "eos_token_id", "bos_token_id", "pad_token_id"),
        "decoder_start_token_id",
    }
)

BEAMS: Final[Mapping[str, tuple[object, ...]]] = {
    "num_beams": (1,),
    "length_penalty": (1, 0),
    "early_stopping": (False,),
}
"""Of searching with beams, and the values that ask for nothing. The last two do nothing without."""

REFUSED: Final[Mapping[str, tuple[object, ...]]] = {
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "forced_decoder_ids": ([],),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": ({},),
    "token_healing": (False,),
    "max_time": (),
}
"""What no engine does, and the values that ask for nothing."""

WITHOUT_EFFECT: Final = frozenset(
    {
        # The request and the model's settings say how long and how many.
        *("max_length", "max_new_tokens", "num_return_sequences"),
        # Rows that are not finite fail; scores are always those of the model.
        *("remove_invalid_values", "renormalize_logits"),
        # How `generate` computes and what else it returns.
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory"),
        *("compile_config", "disable_compile", "prefill_chunk_size", "continuous_batching_config"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("return_dict_in_generate", "transformers_version", "_from_model_config"),
        # Guessing ahead gives the same tokens sooner.
        *("use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
        *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
        *("assistant_ensemble_weight", "speculation_type"),
    }
)

_OLD_DEFAULTS: Final = {"do_sample": False, "top_k": 50, "temperature": 1.0, "top_p": 1.0}
"""A config.json may hold these because older versions wrote out their defaults."""


@dataclass(frozen=True, slots=True)
class GenerationRules:
    """What holds for every answer of a model, whatever its request says."""

    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    min_length: int = 0  #: with a decoder's prompt
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    stop_strings: tuple[str, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of `SamplingParams`' fields, for requests that leave them out."""

    def merged(self, params: SamplingParams) -> SamplingParams:
        """With the model's defaults for what the request leaves out, and its stop strings."""
        given = {name: value for name, value in self.defaults.items() if name in params.unset}
        return replace(params, stop=(*params.stop, *self.stop_strings), **given)


def load_rules(
    folder: Path, settings: ModelSettings, *, obeyed: Collection[str] = ()
) -> GenerationRules:
    """The rules of a model's folder; none if the model's settings say so.

    `obeyed` names what an engine does beyond all engines. Raises `ConfigError` that names every
    field that would be dropped.
    """
    if settings.generation_config == "none":
        return GenerationRules()
    found = _written(folder)
    refused = {
        name: found[name]
        for name, neutral in {**REFUSED, **BEAMS}.items()
        if name not in obeyed and name in found and found[name] not in neutral
    }
    if "num_beams" not in refused:
        refused = {name: value for name, value in refused.items() if name not in BEAMS}
    if refused:
        named = ", ".join(f"{name} = {str(value)[:40]}" for name, value in refused.items())
        raise ConfigError(
            f"The model's {FILE} asks for {named}, which the engine {settings.engine} does not do. "
            'Set generation_config = "none" in its entry of models.toml to run it without its own '
            "generation settings, or edit the file."
        )
    try:
        return rules_of(found)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"The model's {FILE} cannot be read: {error}.") from None


def _written(folder: Path) -> dict[str, Any]:
    """What the file says, but for nulls; where there is none config.json, as in transformers."""
    if (folder / FILE).is_file():
        found = read_json(folder / FILE)
    else:
        config = read_json(folder / "config.json")
        nested = [config.get(name) or {} for name in ("text_config", "decoder", "generator")]
        found = {name: value for each in [*nested, config] for name, value in each.items()}
        if found.pop("force_bos_token_to_be_generated", False):
            found.setdefault("forced_bos_token_id", found.get("bos_token_id"))
        for name, value in _OLD_DEFAULTS.items():
            if found.get(name) == value:
                del found[name]
    return {name: value for name, value in found.items() if value is not None}


def rules_of(found: Mapping[str, Any]) -> GenerationRules:
    eos = _ids(found.get("eos_token_id", ()))
    forced_eos = _ids(found.get("forced_eos_token_id", ()))
    forced_bos = _ids(found.get("forced_bos_token_id", ()))
    stop = found.get("stop_strings", ())
    return GenerationRules(
        suppress_tokens=_ids(found.get("suppress_tokens", ())),
        begin_suppress_tokens=_ids(found.get("begin_suppress_tokens", ())),
        sequence_bias=tuple(_biases(found.get("sequence_bias", ()))),
        bad_words=tuple(
            ids for each in found.get("bad_words_ids", ()) if (ids := _ids(each)) not in _alone(eos)
        ),
        forced_bos_token_id=min(forced_bos, default=None),
        forced_eos_token_id=min(forced_eos, default=None),
        # As in transformers, the newer of the two counts alone.
        min_length=0 if "min_new_tokens" in found else int(found.get("min_length", 0)),
        min_new_tokens=int(found.get("min_new_tokens", 0)),
        no_repeat_ngram_size=int(found.get("no_repeat_ngram_size", 0)),
        stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
        num_beams=int(found.get("num_beams", 1)),
        length_penalty=float(found.get("length_penalty", 1.0)),
        early_stopping=found.get("early_stopping", False),
        defaults=_defaults(found),
    )


def _defaults(found: Mapping[str, Any]) -> dict[str, Any]:
    """How to sample, as in vLLM; a model that says that it does not sample is greedy."""
    named = ("temperature", "top_p", "min_p", "repetition_penalty")
    defaults: dict[str, Any] = {name: float(found[name]) for name in named if name in found}
    if "top_k" in found:
        defaults["top_k"] = max(0, int(found["top_k"]))
    if found.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def _ids(value: Any) -> tuple[int, ...]:
    """One token id, or several."""
    return (value,) if isinstance(value, int) else tuple(int(each) for each in value)


def _alone(ids: Collection[int]) -> set[tuple[int, ...]]:
    """Bad words that transformers leaves out: a model that may never end is of no use."""
    return {(), *((each,) for each in ids)}


def _biases(value: Any) -> list[tuple[tuple[int, ...], float]]:
    """Written as pairs of ids and bias, or keyed by ids."""
    pairs = value.items() if isinstance(value, dict) else value
    return [(_ids(ids), float(bias)) for ids, bias in pairs]
