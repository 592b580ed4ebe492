"""What warm-up runs, and which calls it takes for the cost."""

import time
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from export.spec import Component, ModelDimensions
from server.config import ModelConfig
from server.costs import CostTable
from server.queue_policy import QueuePolicy
from server.worker.warmup import REPEATS, WarmUp, rows_to_try
from tests.fakes import FakeClock

DIMENSIONS = ModelDimensions(latent_channels=4, caption_dim=8, vocabulary=10)
Call = tuple[Component, tuple[tuple[int, ...], ...]]


class FakeExecutor:
    """The first `slow` calls of a shape take 9 s, all others a tenth of one or what is said of so many rows."""

    def __init__(
        self,
        clock: FakeClock,
        slow: int,
        full: bool = False,
        by_rows: Mapping[int, float] | None = None,
        most_rows: int = 99,
    ) -> None:
        self._clock, self._slow, self._full = clock, slow, full
        self._by_rows, self._most_rows = by_rows or {}, most_rows
        self.calls: Counter[Call] = Counter()
        self.freed = 0

    def run(self, component: Component, inputs: dict[str, Tensor]) -> None:
        if self._full or (component is Component.DENOISER and inputs["latents"].shape[0] > self._most_rows):
            raise torch.OutOfMemoryError("full")
        call = component, tuple(tuple(t.shape) for t in inputs.values())
        self.calls[call] += 1
        usual = self._by_rows.get(call[1][0][0], 0.1)
        self._clock.now += 9.0 if self.calls[call] <= self._slow else usual

    def free_memory(self) -> None:
        self.freed += 1
        self._full = False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def warm_up(executor: FakeExecutor, max_batch_size: int = 1, **settings: object) -> CostTable:
    costs = CostTable()
    model = ModelConfig(name="demo", default_size=(64, 64), max_batch_size=max_batch_size)
    WarmUp(executor, DIMENSIONS, lambda component: None, **settings).run(model, costs)  # type: ignore[arg-type]
    return costs


@pytest.mark.parametrize("preparing", [1, 2])
def test_costs_are_of_calls_that_are_prepared(clock: FakeClock, preparing: int) -> None:
    executor = FakeExecutor(clock, slow=preparing)
    costs = warm_up(executor, preparing=preparing)
    assert {cost.component for cost in costs.costs()} == set(Component)
    assert all(cost.seconds == pytest.approx(0.1) for cost in costs.costs())
    assert set(executor.calls.values()) == {preparing + REPEATS}


def test_the_default_size_is_the_last(clock: FakeClock) -> None:
    """An engine that keeps recordings of so many shapes keeps the last."""
    executor = FakeExecutor(clock, slow=0)
    model = ModelConfig(name="demo", default_size=(64, 64), warmup_sizes=((64, 64), (96, 64), (128, 64)))
    WarmUp(executor, DIMENSIONS, lambda component: None).run(model, CostTable())
    decoded = [shapes[0] for component, shapes in executor.calls if component is Component.IMAGE_DECODER]
    assert [8 * width for *_, width in decoded] == [128, 96, 64]


def test_every_length_of_prompt_is_prepared(clock: FakeClock) -> None:
    executor = FakeExecutor(clock, slow=2)
    warm_up(executor, captions=(32, 96, 128), preparing=2)
    encoded = {shapes[0][1]: n for (c, shapes), n in executor.calls.items() if c is Component.PROMPT_ENCODER}
    steps = {(s[0][0], s[2][1]): n for (c, s), n in executor.calls.items() if c is Component.DENOISER}
    assert set(encoded) == {32, 64, 96, 128}
    assert steps == {(rows, length): 5 if length == 32 else 2 for rows in (1, 2) for length in (32, 96, 128)}


@pytest.mark.parametrize(
    ("by_rows", "expected"),
    [
        ({1: 0.09, 2: 0.18, 4: 0.36, 8: 0.72}, {1, 2}),  # full with one image; guidance needs two rows all the same
        ({1: 0.09, 2: 0.16, 4: 0.30, 8: 0.58}, {1, 2, 4, 8}),
        ({1: 0.02, 2: 0.04, 4: 0.08, 8: 0.16}, {1, 2, 4, 8}),  # too short to tell
        ({1: 0.60, 2: 0.90, 4: 1.80, 8: 3.60}, {1}),
    ],
)
def test_batches_are_tried_until_the_device_is_full(
    clock: FakeClock, by_rows: dict[int, float], expected: set[int]
) -> None:
    executor = FakeExecutor(clock, slow=0, by_rows=by_rows)
    costs = warm_up(executor, max_batch_size=4)
    assert set(costs.measured(64, 64)) == expected


@pytest.mark.parametrize(
    ("largest", "preferred", "expected"),
    [(1, (), [1, 2]), (4, (), [1, 2, 4, 8]), (3, (), [1, 2, 3, 4, 6]), (4, (3, 9), [1, 2, 3, 4, 6, 8])],
)
def test_the_largest_batch_and_those_that_are_preferred_are_tried(
    largest: int, preferred: tuple[int, ...], expected: list[int]
) -> None:
    """Only what was measured is shared; twice as many rows are, with guidance."""
    queue = QueuePolicy(preferred_batch_sizes=preferred)
    assert rows_to_try(ModelConfig(name="demo", max_batch_size=largest, queue=queue)) == expected


def test_a_shape_without_memory_is_tried_again_once_some_has_been_freed(clock: FakeClock) -> None:
    executor = FakeExecutor(clock, slow=1, full=True)
    assert warm_up(executor).step(64, 64) == pytest.approx(0.1)
    assert executor.freed == 1


def test_a_batch_without_memory_is_not_planned_and_the_worker_starts(clock: FakeClock) -> None:
    costs = warm_up(FakeExecutor(clock, slow=1, most_rows=2), max_batch_size=4)
    assert set(costs.measured(64, 64)) == {1, 2}
    with pytest.raises(torch.OutOfMemoryError):
        warm_up(FakeExecutor(clock, slow=1, most_rows=0))
