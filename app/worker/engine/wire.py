"""What the worker and its engine process say to each other, over a socket, pickled.

Both ends are one program on one machine, though their interpreters may differ; nobody else can
reach the socket.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from app.config.settings import ModelSettings
from app.engines.base import Generation, Sequence, StepStats, TokenLogprob
from app.engines.hardware import Hardware


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that the engine process is to load."""

    name: str
    folder: Path
    settings: ModelSettings
    factory: str  #: of its engine, "module:attribute"


@dataclass(frozen=True, slots=True)
class LoadModels:
    models: tuple[ServedModel, ...]
    device: str
    threads: int
    builds: Path | None = None  #: where engines keep what they compile


@dataclass(frozen=True, slots=True)
class Admit:
    """Sequences of one batch. They wait here while their engine takes none."""

    model: str
    batch_id: str
    sequences: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    model: str
    sequence_id: int


@dataclass(frozen=True, slots=True)
class Recall:
    """Give back what has not begun yet; answered by `Recalled` at once, whatever runs."""

    model: str


Command = LoadModels | Admit | Cancel | Recall


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the host needs to know of a loaded engine."""

    max_rows: int
    joins: bool
    kernels: str = "torch"  #: what computes, for people


@dataclass(frozen=True, slots=True)
class Ready:
    engines: dict[str, EngineFacts]
    load_ns: int
    hardware: Hardware = field(default_factory=Hardware)


@dataclass(frozen=True, slots=True)
class Stepped:
    """What ended in the last steps, and what those computed."""

    model: str
    generations: list[Generation]
    stats: list[StepStats]


@dataclass(frozen=True, slots=True)
class Streamed:
    """New of sequences that stream: on a socket of its own, read by `app.worker.streams`."""

    tokens: list[tuple[int, str, tuple[int, ...], tuple[TokenLogprob, ...]]]
    """Fields of `NewTokens`, without their class: there may be thousands a second."""
    ended: tuple[int, ...] = ()  #: sequences of which these were the last
    lost: tuple[int, ...] = ()  #: sequences of which some could not be sent


@dataclass(frozen=True, slots=True)
class DidNotFit:
    """Out of memory: everything inside this engine was dropped unharmed. What was sent to it
    meanwhile was not inside yet, and runs, or, if nobody can join it, was given back before."""

    model: str
    sequence_ids: tuple[int, ...]
    device_ns: int = 0  #: what they had taken, the step that did not fit included


@dataclass(frozen=True, slots=True)
class Recalled:
    """The sequences that had not begun, and do not run any more."""

    model: str
    sequence_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Broken:
    """The end of an engine process, by itself or by the host. `reason` never holds a prompt."""

    reason: str
    will_not_load: bool = False
    was_killed: bool = False  #: by SIGKILL and not by the host: mostly the kernel, out of memory
    was_stuck: bool = False  #: the host killed it
    was_ended: bool = False  #: by SIGTERM, as for an error of the device

    @property
    def may_be_innocent(self) -> bool:
        """Whether its end says little of what ran inside."""
        return self.was_killed or self.was_stuck or self.was_ended


Event = Ready | Stepped | DidNotFit | Recalled | Broken
