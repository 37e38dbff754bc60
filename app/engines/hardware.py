"""The device as its driver names it, and the versions of what computes. Imports nothing heavy."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_LIBRARIES: Final = ("torch", "transformers", "vllm", "triton")


@dataclass(frozen=True, slots=True)
class Hardware:
    name: str = ""
    index: int | None = None  #: among the devices that the process sees; None of a processor
    versions: dict[str, str] = field(default_factory=dict)


def hardware(asked: str) -> Hardware:
    """What the engines of this process run on, once they are loaded; `asked` as in the settings.

    A library that no engine has imported is none that computes.
    """
    versions = {
        name: str(module.__version__)
        for name in _LIBRARIES
        if (module := sys.modules.get(name)) is not None and hasattr(module, "__version__")
    }
    torch = sys.modules.get("torch")
    if torch is None or asked == "cpu" or not torch.cuda.is_available():
        return Hardware(processor(), None, versions)
    _, _, number = asked.partition(":")
    index = int(number) if number else torch.cuda.current_device()
    return Hardware(torch.cuda.get_device_name(index), index, versions)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
