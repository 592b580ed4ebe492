"""GPU readings from NVML, the driver's management library; without it there are no GPUs. Nothing touches a device."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU; `readers` are keyed by metric name."""

    uuid: str
    readers: dict[str, Callable[[], float]]
    unreadable: type[Exception]

    def read(self) -> dict[str, float]:
        """What can be read now; a GPU may lack some sensors."""
        found = {}
        for name, reader in self.readers.items():
            with contextlib.suppress(self.unreadable):
                found[name] = reader()
        return found


def open_gpus() -> list[Gpu]:
    """All GPUs of this machine."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return [_open(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _open(nvml: Any, handle: Any) -> Gpu:
    uuid = nvml.nvmlDeviceGetUUID(handle)
    start = 0.0
    with contextlib.suppress(nvml.NVMLError):
        start = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    readers: dict[str, Callable[[], float]] = {
        "nv_gpu_utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "nv_gpu_memory_total_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
        "nv_gpu_memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        "nv_gpu_power_usage": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "nv_gpu_power_limit": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "nv_energy_consumption": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3 - start,
    }
    return Gpu(uuid if isinstance(uuid, str) else uuid.decode(), readers, nvml.NVMLError)
