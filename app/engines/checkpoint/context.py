"""How many tokens a model takes, by its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from app.config.settings import ModelSettings
from app.engines.checkpoint import sentence_files
from app.errors import ConfigError
from app.jobs import Kind

UNLIMITED: Final = 10**9
"""transformers writes a model_max_length far beyond this where there is no limit."""
PADDING_HAS_PLACES: Final = frozenset(
    {
        *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke"),
        *("markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
        "xmod",
    }
)
"""Model types whose positions begin behind the id of the padding token (`padding_idx + 1`)."""


def context_tokens(
    folder: Path, config: dict[str, Any], texts: dict[str, Any], settings: ModelSettings
) -> int:
    """The smallest limit that the model's files name, or the one that is set.

    `config` is that of the text model, `texts` that of the tokenizer. Raises `ConfigError` if none
    is named, or more is set than the model takes.
    """
    places = _places(config)
    named = [places, config.get("n_positions"), texts.get("model_max_length")]
    if settings.kind is not Kind.GENERATE and (files := sentence_files.read(folder)):
        named.append(files.max_seq_length)
    own = min((limit for limit in named if limit and limit < UNLIMITED), default=None)
    wanted = settings.context_tokens or own
    if wanted is None:
        raise ConfigError("The model's files name no context length; set context_tokens.")
    # T5 knows distances, not places; MPNet knows both.
    is_bound = places is not None or "relative_attention_num_buckets" not in config
    if own is not None and wanted > own and is_bound:
        raise ConfigError(f"context_tokens is {wanted}, but the model's context is {own} tokens.")
    return wanted


def _places(config: dict[str, Any]) -> int | None:
    """Tokens for which there are position embeddings, without those that stand for padding."""
    places: int | None = config.get("max_position_embeddings")
    kind = config.get("model_type")
    if places is None or kind not in PADDING_HAS_PLACES:
        return places
    if config.get("position_embedding_type") == "rotary":
        return places
    # MPNet's own code has 1, whatever its configuration says.
    padding = 1 if kind == "mpnet" else config.get("pad_token_id", 1)
    return places - (padding or 0) - 1
