"""What Gristmill has to know of an engine before it is loaded.

A package that brings an engine names one of these in its entry-point group `gristmill.engines`:

    [project.entry-points."gristmill.engines"]
    echo = "gristmill_echo:ENGINE"

    ENGINE = EngineSpec("gristmill_echo.engine:EchoEngine")

It is read wherever models are: in the API as well as in workers. So it names what is heavy, as
"module:attribute", and imports nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from app.config.settings import ModelSettings
from app.jobs import Kind

GROUP: Final = "gristmill.engines"


class Files(enum.Enum):
    """What of a model's folder has to be there."""

    MODEL = enum.auto()  #: full weights, configuration and tokenizer
    ANY_MODEL = enum.auto()  #: the same, quantized or not, of architectures known here or not
    TOKENIZER = enum.auto()  #: all but the weights
    NONE = enum.auto()


@dataclass(frozen=True, slots=True)
class EngineSpec:
    factory: str
    """Called with (folder, settings, device, threads, progress), in the engine process alone;
    makes a `base.Engine`."""
    files: Callable[[ModelSettings], Files] = lambda _: Files.MODEL
    tokenizer: str = "app.engines.text.piece_tokenizer:file_tokenizer"
    """Called with (folder, settings); makes an `app.engines.text.tokenizer.Tokenizer`."""
    kinds: frozenset[Kind] = frozenset(Kind)
    """Of the models that it runs."""
    card: str = "app.engines.checkpoint.card:plain_card"
    """Called with (folder, settings); makes an `app.engines.checkpoint.card.Card`."""
    check: str = ""
    """Called with the settings at start, if named; raises `ConfigError` for wrong options."""
    takes_adapters: bool = False
    """Whether it runs the LoRA adapters that a model's settings name."""
    scores_prompts: bool = False
    """Whether it gives the log-probabilities of a prompt's own tokens."""
    fits: str = ""
    """Called with (folder, settings) by who has time for it, if named: raises `ConfigError` if the
    engine would refuse the model. Reads no weights."""
    searches: bool = False
    """Whether it finds answers with beams (`num_beams`), too."""
    joins: Callable[[ModelSettings], bool] = lambda _: False
    """Whether it takes sequences between its steps, as far as can be said before it is loaded."""
    chooses_python: bool = False
    """Whether the engine process runs in the interpreter that the option `python` names."""


STUB: Final = EngineSpec(
    "app.engines.stub:StubEngine",
    files=lambda _: Files.NONE,
    tokenizer="app.engines.text.tokenizer:stub_tokenizer",
    searches=True,  # its answers are the same either way
    card="app.engines.checkpoint.card:stub_card",
    scores_prompts=True,
    joins=lambda settings: bool(settings.options.get("joins", False)),
)
GENERATE: Final = EngineSpec(
    "app.engines.generate.engine:GenerateEngine",
    kinds=frozenset({Kind.GENERATE, Kind.TRANSLATE}),
    fits="app.engines.checkpoint.loading:writer_fits",
    searches=True,
)
INFLIGHT: Final = EngineSpec(
    "app.engines.inflight:InflightEngine",
    kinds=frozenset({Kind.GENERATE}),
    fits="app.engines.inflight.loading:decoder_fits",
    joins=lambda _: True,
    scores_prompts=True,
)
ENCODER: Final = EngineSpec(
    "app.engines.encoder.engine:EncoderEngine",
    kinds=frozenset({Kind.EMBED, Kind.CLASSIFY, Kind.RERANK}),
    card="app.engines.checkpoint.card:read_card",
    fits="app.engines.encoder.engine:encoder_fits",
)
VLLM: Final = EngineSpec(
    "app.engines.vllm.engine:VllmEngine",
    kinds=frozenset({Kind.GENERATE}),
    files=lambda _: Files.ANY_MODEL,
    check="app.engines.vllm.options:check",
    joins=lambda _: True,
    takes_adapters=True,
    scores_prompts=True,
    chooses_python=True,
)
OPENAI: Final = EngineSpec(
    "app.engines.openai.engine:OpenAiEngine",
    kinds=frozenset({Kind.GENERATE, Kind.EMBED}),
    files=lambda settings: Files.NONE if settings.source == "upstream" else Files.TOKENIZER,
    tokenizer="app.engines.openai.tokenizer:load",
    check="app.engines.openai.options:check",
    joins=lambda _: True,
)
