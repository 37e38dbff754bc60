"""What a model's files say of a model that gives one answer to a text: vector, classes or score.

Read by all who check requests, so this imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from app.config.settings import ModelSettings
from app.engines import registry
from app.engines.checkpoint import sentence_files
from app.engines.checkpoint.json_files import class_names, read_json
from app.engines.checkpoint.sentence_files import SentenceFiles
from app.errors import ConfigError, RequestError
from app.jobs import Kind

_SIZES: Final = ("hidden_size", "d_model", "dim", "n_embd")
"""Names that configurations give to the width of a token's vector."""
_HEADS: Final = {
    "ForSequenceClassification": "is a classifier; set kind classify or rerank",
    "ForTokenClassification": "labels tokens",
    "ForQuestionAnswering": "finds answers in texts",
    "ForMultipleChoice": "chooses among texts",
    "ForCausalLM": "generates text; set kind generate",
    "LMHeadModel": "generates text; set kind generate",
    "ForConditionalGeneration": "generates text; set kind generate",
}
"""Ends of the names of architectures whose token vectors were never trained to be pooled."""
_INPUT_TYPES: Final = {
    "query": ("query",),
    "search_query": ("query",),
    "document": ("document", "passage", "corpus"),
    "passage": ("passage", "document", "corpus"),
    "search_document": ("document", "passage", "corpus"),
}
"""Which prompt an `input_type` means: the first of these that the model has."""


@dataclass(frozen=True, slots=True)
class Card:
    labels: tuple[str, ...] = ()  #: of the classes, by their place in the scores
    strips: bool = False  #: blanks around a text do not count
    lowers: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)  #: texts put before a text, by name
    default_prompt: str = ""
    pools_prompt: bool = True  #: whether such a text is part of what is pooled
    size: int | None = None  #: of a vector, where the files tell
    shorter: frozenset[int] | None = frozenset()
    """Dimensions that a vector may be cut to; None is any."""

    def text(self, given: str) -> str:
        """A text as the tokenizer is to have it."""
        stripped = given.strip() if self.strips else given
        return stripped.lower() if self.lowers else stripped

    def prompt(self, name: str | None, input_type: str | None) -> str:
        """The text to put before a text. Raises `RequestError` if there is none of this name."""
        if name is not None:
            if name not in self.prompts:
                known = ", ".join(self.prompts) or "none"
                raise RequestError(
                    f"This model has no such prompt; its prompts are: {known}.", param="prompt_name"
                )
            return self.prompts[name]
        wanted = _INPUT_TYPES[input_type] if input_type else ()
        found = (self.prompts[each] for each in wanted if each in self.prompts)
        return next(found, self.default_prompt)

    def check_dimensions(self, wanted: int) -> None:
        """Raise `RequestError` unless a vector of this model may be cut to this size."""
        if wanted == self.size or (
            wanted < (self.size or wanted + 1) and (self.shorter is None or wanted in self.shorter)
        ):
            return
        if self.shorter is None:
            known = f"1 to {self.size}" if self.size else "any up to its own size"
        else:
            sizes = {*self.shorter, *([self.size] if self.size else [])}
            known = ", ".join(map(str, sorted(sizes))) or "its own alone"
        raise RequestError(
            f"The vectors of this model cannot have {wanted} dimensions; it gives: {known}.",
            param="dimensions",
        )


NO_CARD: Final = Card()


def stub_card(folder: Path, settings: ModelSettings) -> Card:
    return Card(labels=("LABEL_0", "LABEL_1"), size=8, shorter=None)


def plain_card(folder: Path, settings: ModelSettings) -> Card:
    """For engines that look into the folder themselves, if there is one."""
    if settings.kind is not Kind.CLASSIFY:
        return Card(shorter=None)
    return Card(labels=_labels(read_json(folder / "config.json")))


def read_card(folder: Path, settings: ModelSettings) -> Card:
    """For the engine encoder. Raises `ConfigError` for what it does not do."""
    config, files = read_json(folder / "config.json"), sentence_files.read(folder)
    if settings.kind is Kind.EMBED:
        if files is None:
            _refuse_heads(config)
        return _of_embedder(config, files, settings)
    _check_classifier(config, files, settings.kind)
    return Card(labels=_labels(config), strips=settings.kind is Kind.RERANK)


def _refuse_heads(config: dict[str, Any]) -> None:
    """Where no file says how to pool, only what is made for it is taken to be an embedder."""
    for name in class_names(config.get("architectures")):
        for end, what in _HEADS.items():
            if name.endswith(end):
                raise ConfigError(
                    f"the model is a {name}, which {what}. As an embedder it needs the files of "
                    "sentence-transformers that say how its tokens are pooled."
                )


def _check_classifier(config: dict[str, Any], files: SentenceFiles | None, kind: Kind) -> None:
    names = class_names(config.get("architectures"))
    if names and not any(name.endswith("ForSequenceClassification") for name in names):
        raise ConfigError(
            f"kind is {kind}, but the model is a {' and '.join(names)}, which has no head that "
            "classifies."
        )
    if files is not None and (files.layers or files.prompts):
        raise ConfigError("the engine encoder puts no modules or prompts around a classifier.")
    classes = len(_labels(config))
    if kind is Kind.RERANK and classes != 1:
        raise ConfigError(
            f"kind is rerank, but the model has {classes} classes: a cross-encoder gives one "
            "score. Set kind classify."
        )


def _of_embedder(
    config: dict[str, Any], files: SentenceFiles | None, settings: ModelSettings
) -> Card:
    told = files or SentenceFiles()
    config = config.get("text_config", config)
    width = next((config[name] for name in _SIZES if isinstance(config.get(name), int)), None)
    size = width and width * len(told.poolings)
    for layer in told.layers:
        size = layer.config.get("out_features", size) if layer.name == "Dense" else size
    return Card(
        strips=files is not None,
        lowers=told.do_lower_case,
        prompts=told.prompts,
        default_prompt=told.prompts.get(told.default_prompt_name or "", ""),
        pools_prompt=told.include_prompt,
        size=size,
        shorter=_shorter(config, settings),
    )


def _shorter(config: dict[str, Any], settings: ModelSettings) -> frozenset[int] | None:
    """As the model's own configuration has it, in the words of vLLM, or the setting's option."""
    if named := config.get("matryoshka_dimensions"):
        return frozenset(named)
    is_any = config.get("is_matryoshka") or settings.options.get("matryoshka")
    return None if is_any else frozenset()


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classes; LABEL_0, LABEL_1 and so on where there are none, as in transformers."""
    named = config.get("id2label")
    if not named:
        return tuple(f"LABEL_{place}" for place in range(config.get("num_labels", 2)))
    # A character that Postgres or UTF-8 does not have would keep each answer from being stored.
    labels = {
        int(place): str(label).replace("\0", "\ufffd").encode(errors="replace").decode()
        for place, label in named.items()
    }
    if sorted(labels) != list(range(len(labels))) or len(set(labels.values())) != len(labels):
        raise ConfigError("The id2label of config.json does not name each class once, from 0 on.")
    return tuple(labels[place] for place in range(len(labels)))


def load_card(folder: Path, settings: ModelSettings) -> Card:
    """The card of a model that `app.engines.checkpoint.models.ensure_files` made ready."""
    make = registry.attribute(registry.find(settings.engine).card)
    return cast(Card, make(folder, settings))
