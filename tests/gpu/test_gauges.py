"""On an NVIDIA GPU: the gauges of the GPU, as Triton names and measures them. Run by `make test-gpu`."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.process import ServerProcess, wait_for
from tests.integration.triton.conftest import IDENTITIES, write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GAUGES = (
    "nv_gpu_utilization",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_power_usage",
    "nv_gpu_power_limit",
    "nv_energy_consumption",
)
LINE = re.compile(r'\n(nv_(?:gpu|energy)_\w+)\{gpu_uuid="([^"]+)"\} (\S+)')  # as perf_analyzer looks for them
GIBIBYTE = 1 << 30


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    repository: Path = tmp_path_factory.mktemp("models")
    write_model(repository, "identity", IDENTITIES["identity"])
    with ServerProcess(repository, "--metrics-interval-ms=50") as running:
        yield running


def values(server: ServerProcess) -> dict[str, float]:
    """Of the GPU that torch uses, by name."""
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    return {name: float(value) for name, found, value in LINE.findall(server.metrics()) if found == uuid}


def test_all_are_there_in_plain_decimals(server: ServerProcess) -> None:
    assert sorted(values(server)) == sorted(GAUGES)
    found = LINE.findall(server.metrics())
    assert {uuid.partition("-")[0] for _, uuid, _ in found} == {"GPU"}
    assert all(re.fullmatch(r"\d+\.?\d*", value) for _, _, value in found), found


def test_memory_is_in_bytes(server: ServerProcess) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    before = values(server)
    assert before["nv_gpu_memory_total_bytes"] == pytest.approx(total, rel=0.05), "what the driver keeps counts"
    assert 0 < before["nv_gpu_memory_used_bytes"] < before["nv_gpu_memory_total_bytes"]
    held = torch.empty(GIBIBYTE, dtype=torch.uint8, device="cuda")

    def grown() -> float:
        return values(server)["nv_gpu_memory_used_bytes"] - before["nv_gpu_memory_used_bytes"]

    wait_for(lambda: grown() > 0.9 * GIBIBYTE, 60)
    assert grown() < 3 * GIBIBYTE, "the memory, and torch's context where it is the first use"
    del held
    torch.cuda.empty_cache()


def test_power_is_in_watts(server: ServerProcess) -> None:
    found = values(server)
    assert 1 < found["nv_gpu_power_usage"] < 3000
    assert 10 < found["nv_gpu_power_limit"] < 3000


def test_energy_is_in_joules_since_the_start_and_rises(server: ServerProcess) -> None:
    first = values(server)["nv_energy_consumption"]
    power = values(server)["nv_gpu_power_usage"]
    later = wait_for(lambda: max(0.0, values(server)["nv_energy_consumption"] - first), 60)
    assert 0 < later < 60 * 3000
    assert first < 600 * max(power, 1000), "not since the driver was loaded"


def test_utilization_is_a_share(server: ServerProcess) -> None:
    def busy() -> float:
        torch.cuda._sleep(800_000_000)  # cycles: about 0.4 s, longer than readings are apart
        time.sleep(0.2)
        return values(server)["nv_gpu_utilization"]

    assert 0 < wait_for(busy, 60) <= 1
    torch.cuda.synchronize()
