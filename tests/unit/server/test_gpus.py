"""What is read of GPUs: the units, and what of them may be missing. With a real one in tests/gpu/test_gauges.py."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from server.frontend.gpus import open_gpus


class NVMLError(Exception):
    pass


class FakeNvml:
    """pynvml with two GPUs; the second has no energy counter."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.millijoules = 5_000_000

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=25, memory=3)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=8 << 30, used=1 << 30, free=7 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return 123_456

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:  # noqa: N802
        return 700_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if handle:
            raise NVMLError("not supported")
        return self.millijoules


def test_units_are_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    first, second = open_gpus()
    nvml.millijoules += 2_500
    assert first.uuid == "GPU-0"
    assert first.read() == {
        "nv_gpu_utilization": 0.25,
        "nv_gpu_memory_total_bytes": 8 << 30,
        "nv_gpu_memory_used_bytes": 1 << 30,
        "nv_gpu_power_usage": 123.456,
        "nv_gpu_power_limit": 700.0,
        "nv_energy_consumption": 2.5,
    }
    assert "nv_energy_consumption" not in second.read()
    assert second.read()["nv_gpu_power_usage"] == 123.456


def test_a_machine_without_the_library_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()

    def missing() -> None:
        raise NVMLError("library not found")

    monkeypatch.setattr(nvml, "nvmlInit", missing)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert open_gpus() == []
