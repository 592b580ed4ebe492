"""What the simulated GPUs take: the figures of a committed record, for as long as it says."""

import pytest

from benchmarks.record import BenchmarkError, read
from benchmarks.simulation import MEASURED, STEPS, Simulation, device_costs
from benchmarks.workload import Arrival
from export.spec import Component
from server.costs import CostTable
from server.worker.planner import Planner
from tests.unit.benchmarks.records import record


def p50(component: Component, size: str) -> float:
    (found,) = [
        r["ms"]["p50"]
        for r in read(MEASURED)["rows"]
        if (r["case"]["component"], r["case"]["size"], r["case"]["engine"]) == (component, size, "aotinductor")
    ]
    return float(found) / 1e3


def test_a_gpu_is_as_fast_as_the_record_says() -> None:
    table = CostTable(device_costs(read(MEASURED)))
    assert table.encode() == p50(Component.PROMPT_ENCODER, "any")
    for side in (512, 1024):
        assert table.step(side, side) == p50(Component.DENOISER, f"{side}x{side}")
        assert table.decode(side, side) == p50(Component.IMAGE_DECODER, f"{side}x{side}")


def test_sharing_a_step_pays_at_512_and_not_at_1024() -> None:
    table = CostTable(device_costs(read(MEASURED)))
    assert table.step(512, 512, 4) / 4 < table.step(512, 512, 2) / 2 < table.step(512, 512)
    assert table.step(1024, 1024, 2) / 2 == pytest.approx(1.01 * table.step(1024, 1024))


def test_a_record_without_a_size_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="no row of component prompt_encoder, size any, batch 1, engine aotind"):
        device_costs(record("components"))


async def test_one_request_takes_its_prompt_its_steps_and_its_decode() -> None:
    costs = device_costs(read(MEASURED))
    (outcome,) = Simulation(Planner, 1, costs).run([Arrival(0.0, "standard", (512, 512), 4, 60.0)])
    assert outcome.latency == pytest.approx(CostTable(costs).image(512, 512, steps=STEPS, rows=1))
