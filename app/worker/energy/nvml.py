"""The energy counter of an NVIDIA board, through the driver's library NVML.

It counts millijoules since the driver was loaded, for the whole board, on Volta and newer ones, and
moves about ten times a second.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any, Final

from app.books.energy import NJ_PER_MJ
from app.worker.energy.counter import Unusable

BOUNDARY: Final = "gpu"


class NvmlCounter:
    """One board's counter. After a reload of the driver it finds the board again."""

    wraps_at_nj = None

    def __init__(
        self,
        device: str,
        *,
        pci_address: str = "",
        environ: Mapping[str, str] = os.environ,
        library: Any = None,
    ) -> None:
        """`device` is auto, cuda or cuda:N, counted as CUDA does: among the visible ones. An
        address says which board it is whatever the numbers. Raises `Unusable`."""
        self._nvml = library or _library()
        self._index = int(device.partition(":")[2] or 0)
        self._pci_address = pci_address
        self._visible = environ.get("CUDA_VISIBLE_DEVICES")
        try:
            self._handle = self._find()
            if _is_cut(self._nvml, self._handle):
                raise Unusable("the board is cut into MIG instances, which share one counter")
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self.name = _text(self._nvml.nvmlDeviceGetName(self._handle))
        except self._nvml.NVMLError as error:
            raise Unusable(f"NVML says: {error}") from None

    def _find(self) -> Any:
        nvml = self._nvml
        nvml.nvmlInit()
        if self._pci_address.count(":"):
            return nvml.nvmlDeviceGetHandleByPciBusId(_full(self._pci_address))
        if self._visible is None:
            return nvml.nvmlDeviceGetHandleByIndex(self._index)
        listed = [each.strip() for each in self._visible.split(",") if each.strip()]
        if self._index >= len(listed):
            raise Unusable(f"CUDA_VISIBLE_DEVICES hides device {self._index}")
        if listed[self._index].isdecimal():
            return nvml.nvmlDeviceGetHandleByIndex(int(listed[self._index]))
        return nvml.nvmlDeviceGetHandleByUUID(listed[self._index])

    def read(self) -> int | None:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) * NJ_PER_MJ
        except self._nvml.NVMLError:
            self._find_again()
            return None

    def _find_again(self) -> None:
        """For the next reading: a driver that was loaded anew knows none of the old handles."""
        try:
            self._nvml.nvmlShutdown()
            self._handle = self._find()
        except (self._nvml.NVMLError, Unusable):
            pass  # nor does the next one succeed


def _library() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise Unusable("the package nvidia-ml-py is not installed") from None


def _is_cut(nvml: Any, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # boards that cannot be cut
        return False
    return bool(current)


def _full(address: str) -> str:
    """A PCI address as the driver takes it: with a domain, and a function."""
    address = address if address.count(":") == 2 else f"0000:{address}"
    return address if "." in address else f"{address}.0"


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
