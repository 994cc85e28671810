"""Energy that the GPUs of this machine use while a stage is built, from the driver's own counters.

    with EnergyMeter() as meter: ...
    meter.joules                        None where it cannot be known: no NVIDIA driver, a GPU without a counter (before Volta), MIG

A counter counts the whole GPU, so what neighbours do on it is in it; that of the CPU and the rest of the machine is not. Nothing is
ever estimated from a GPU's rated power.
"""

from __future__ import annotations

import ctypes
import os
from types import TracebackType

LIBRARY = "libnvidia-ml.so.1"


class EnergyMeter:
    """Joules between entering and leaving, over the GPUs that this process may use."""

    joules: float | None = None
    gpus: int = 0

    def __enter__(self) -> EnergyMeter:
        self._before = read_counters()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        after = read_counters() if self._before else None
        if self._before and after and len(after) == len(self._before):
            self.gpus = len(after)
            self.joules = sum(end - start for start, end in zip(self._before, after, strict=True)) / 1000


def read_counters() -> list[int] | None:
    """Millijoules since the driver was loaded of each visible GPU; None when one of them, or all, cannot be read."""
    try:
        nvml = ctypes.CDLL(LIBRARY)
        if nvml.nvmlInit_v2() != 0:
            return None
    except (OSError, AttributeError):
        return None
    try:
        counters = [_counter(nvml, name) for name in _visible(nvml)]
        return [value for value in counters if value is not None] if counters and None not in counters else None
    except AttributeError:  # a driver of before these calls
        return None
    finally:
        nvml.nvmlShutdown()


def _visible(nvml: ctypes.CDLL) -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    count = ctypes.c_uint()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return [str(number) for number in range(count.value)]


def _counter(nvml: ctypes.CDLL, name: str) -> int | None:
    device, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
    if name.isdigit():
        found = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(device))
    else:
        found = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(device))
    if found != 0 or nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy)) != 0:
        return None
    return energy.value
