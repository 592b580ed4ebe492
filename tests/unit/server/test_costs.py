"""The cost table: measurements in, seconds out."""

import sys
import threading

import pytest

from export.spec import Component
from server.costs import SIZES, CostTable
from server.requests import StepCost
from server.worker.batching import Batching, BatchPolicy, StepShape

SHAPE = StepShape(256, 256, (32,))


def costs() -> CostTable:
    """As warm-up leaves them: three measurements of 1, 2 and 4 rows."""
    measured = {1: 0.006, 2: 0.0085, 4: 0.014}
    return CostTable(StepCost(256, 256, rows, seconds) for rows, seconds in measured.items() for _ in range(3))


def test_a_step_that_was_held_up_changes_no_decision() -> None:
    """The first run of a new caption length may take long; a batch size not chosen is never measured again."""
    table = costs()
    batching = Batching(table, BatchPolicy(max_batch=4))
    before = [batching.count(SHAPE, waiting, 10.0) for waiting in (1, 2, 3, 4, 8)]
    assert {1, 2, 4} == set(before)
    for rows in (1, 2, 4):
        table.observe(StepCost(256, 256, rows, 0.44))
        table.observe(StepCost(256, 256, rows, 0.44))
    assert [batching.count(SHAPE, waiting, 10.0) for waiting in (1, 2, 3, 4, 8)] == before


def test_a_new_size_costs_what_its_quicker_run_took() -> None:
    table = costs()
    table.observe(StepCost(512, 512, 1, 0.44))
    table.observe(StepCost(512, 512, 1, 0.02))
    assert table.step(512, 512) == 0.02


def test_a_change_that_stays_is_learnt() -> None:
    table = costs()
    for _ in range(9):
        table.observe(StepCost(256, 256, 1, 0.012))
    assert table.step(256, 256) == 0.012


def test_what_was_not_measured_is_scaled_from_the_nearest() -> None:
    table = costs()
    assert table.step(512, 512) == pytest.approx(0.014)  # as many pixels as four rows of 256x256
    assert table.step(1024, 1024) == pytest.approx(4 * 0.014)
    assert table.decode(256, 256) == 0.0
    table.observe(StepCost(256, 256, 1, 0.05, Component.IMAGE_DECODER))
    assert table.image(512, 512, steps=2, rows=1) == pytest.approx(4 * 0.05 + 2 * 0.014)


def test_an_image_with_guidance_has_two_prompts_to_encode_and_one_image_to_decode() -> None:
    table = costs()
    for component, size, seconds in ((Component.PROMPT_ENCODER, 0, 0.03), (Component.IMAGE_DECODER, 256, 0.05)):
        table.observe(StepCost(size, size, 1, seconds, component))
    plain, guided = (table.image(256, 256, steps=2, rows=rows) for rows in (1, 2))
    assert plain == pytest.approx(0.03 + 0.05 + 2 * table.step(256, 256, 1))
    assert guided == pytest.approx(2 * 0.03 + 0.05 + 2 * table.step(256, 256, 2))


def test_the_sizes_measured_last_are_kept() -> None:
    table = CostTable([StepCost(0, 0, 1, 0.01, Component.PROMPT_ENCODER), StepCost(16, 16, 1, 0.5)])
    for number in range(1, SIZES + 10):
        for rows in (1, 2):
            table.observe(StepCost(64, 64 * number, rows, 0.1))
        table.observe(StepCost(16, 16, 1, 0.5))
    sizes = {(c.height, c.width) for c in table.costs() if c.component is Component.DENOISER}
    assert len(sizes) == SIZES
    assert (16, 16) in sizes
    assert (64, 64) not in sizes
    assert table.image(16, 16, steps=1, rows=1) > 0.5, "the prompt encoder's is no size that others push out"
    assert len(table._recent) == len(table.costs())


def test_a_table_is_read_size_by_size() -> None:
    """By the frontend's event loop, at every heartbeat of every worker: no size is compared with all others."""
    compared = 0

    class Side(int):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return int(self) == other

        __hash__ = int.__hash__

    told = [StepCost(Side(64 + n), 64, rows, 0.1) for n in range(SIZES) for rows in (1, 2, 4)]
    table = CostTable(told)
    assert compared < 10 * len(told)
    assert list(table.costs()) == told


def test_the_table_can_be_asked_for_while_it_is_written() -> None:
    """By the worker's event loop; a state that cannot be told would end the worker."""
    table, ended, before = CostTable([StepCost(16, 16, 1, 0.5)]), threading.Event(), sys.getswitchinterval()

    def measure() -> None:
        for number in range(20_000):
            table.observe(StepCost(64, 64 + number, number % 8, 0.1))
            table.observe(StepCost(16, 16, 1, 0.5))
        ended.set()

    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=measure)
        thread.start()
        looks, most = 0, 0
        while not ended.is_set():
            told = table.costs()
            looks, most = looks + 1, max(most, len(told))
            assert StepCost(16, 16, 1, 0.5) in told, "what is measured again is there all the while"
            table.step(64, 64)
    finally:
        sys.setswitchinterval(before)
        thread.join()
    assert looks > 10
    assert 1 < most <= SIZES * 8
