"""Which of the ways to know a worker's energy there is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from app.books.energy import EnergyMethod, PowerModel
from app.config.settings import Settings
from app.errors import ConfigError
from app.worker.energy import nvml, rapl
from app.worker.energy.counter import Counter, Unusable

MODEL_BOUNDARY: Final = "device"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a worker's joules come from. Without counters and model: from nowhere."""

    name: Literal["nvml", "rapl", "model", "none"]
    boundary: str | None  #: whose energy it is
    why: str  #: a sentence for people
    counters: tuple[Counter, ...] = ()
    model: PowerModel | None = None  #: the device's power, if it is configured
    is_assumed: bool = False  #: a board is here; whether the models run on it is not known yet

    def without_counters(self) -> Source:
        """What is left if they are not of the device that the models run on."""
        why = "the models do not run on the board that has a counter"
        if self.model is None:
            return Source("none", None, why)
        return Source("model", MODEL_BOUNDARY, why, (), self.model)

    @property
    def method(self) -> EnergyMethod:
        """The best that a record can say."""
        if self.counters:
            return EnergyMethod.MEASURED
        return EnergyMethod.ESTIMATED if self.model else EnergyMethod.ABSENT


def choose(settings: Settings) -> Source:
    """The source that `energy.source` names; for auto, the first that there is: the device's
    counter, then the power that is configured, then none. Raises `ConfigError` if one that is
    named is not there."""
    energy, device = settings.energy, settings.worker.device
    power = _power(settings)
    told: list[str] = []
    wanted = ("nvml", "rapl", "model") if energy.source == "auto" else (energy.source,)
    for name in wanted:
        try:
            if name == "nvml" and (device != "cpu" or energy.source == "nvml"):
                return _nvml(settings, power)
            if name == "rapl" and (not device.startswith("cuda") or energy.source == "rapl"):
                return _rapl(power)
        except Unusable as error:
            if energy.source != "auto":
                raise ConfigError(f"energy.source is {name}, but {error}.") from None
            told.append(f"no {name}: {error}")
        if name == "model" and power is not None:
            watts = f"{power.idle_mw / 1e3:g} W idle and {power.busy_mw / 1e3:g} W busy"
            return Source("model", MODEL_BOUNDARY, _sentence(f"{watts}, as set", told), (), power)
    if energy.source == "none":
        return Source("none", None, "energy.source is none")
    asked = "set energy.idle_watts and energy.busy_watts for an estimate"
    return Source("none", None, _sentence("not known", [*told, asked]))


def _nvml(settings: Settings, power: PowerModel | None) -> Source:
    worker = settings.worker
    counter = nvml.NvmlCounter(worker.device, pci_address=worker.pci_address)
    why = f"the counter of the {counter.name}"
    is_assumed = settings.energy.source == worker.device == "auto"
    return Source("nvml", nvml.BOUNDARY, why, (counter,), power, is_assumed)


def _rapl(power: PowerModel | None) -> Source:
    counters = rapl.rapl_counters()
    why = f"{len(counters)} counters of this host's processors, for all that runs on it"
    return Source("rapl", rapl.BOUNDARY, why, counters, power)


def _power(settings: Settings) -> PowerModel | None:
    energy = settings.energy
    if not energy.busy_watts:
        return None
    return PowerModel(int(energy.idle_watts * 1_000), int(energy.busy_watts * 1_000))


def _sentence(what: str, told: list[str]) -> str:
    return "; ".join([what, *told])
