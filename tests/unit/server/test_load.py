"""How busy a worker has been, and what follows from it for sharing steps; and what is left of it when too many come."""

import random

import pytest

from export.spec import Component
from server.costs import CostTable
from server.requests import StepCost
from server.turns import Claim
from server.worker.batching import Batching, BatchPolicy, StepShape
from server.worker.busyness import MEMORY, MOST, Load
from server.worker.planner import Plan, PlannedSequence, Planner, Stage

SHAPE = StepShape(512, 512, (64,))
STEPS = 8


def costs(gain: float) -> CostTable:
    """A row more costs so much less than the first; decoding is quick."""
    steps = [StepCost(512, 512, rows, 0.020 * (1 + (1 - gain) * (rows - 1))) for rows in (1, 2, 4)]
    return CostTable([*steps, StepCost(512, 512, 1, 0.006, Component.IMAGE_DECODER)])


def test_without_work_there_is_no_load_and_it_comes_and_goes() -> None:
    load = Load()
    load.note(1000.0, busy=True)
    assert load.share == 0.0
    load.note(1000.0 + MEMORY, busy=True)
    assert load.share == pytest.approx(1 - 1 / 2.718281828)
    load.note(1000.0 + 100 * MEMORY, busy=False)
    assert load.share == MOST
    load.note(1000.0 + 102 * MEMORY, busy=False)
    assert load.share == pytest.approx(1 / 2.718281828**2, rel=1e-6)


def test_half_of_the_time_is_half_a_load() -> None:
    load = Load()
    for second in range(200):
        load.note(float(second), busy=second % 2 == 0)
    assert load.share == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("gain", "load", "shared"), [(0.12, 0.0, 1), (0.12, MOST, 4), (0.015, MOST, 1), (0.5, 0.0, 2)])
def test_more_share_a_step_when_more_are_to_come_but_not_for_a_percent(gain: float, load: float, shared: int) -> None:
    batching = Batching(costs(gain), BatchPolicy(max_batch=4))
    assert batching.count(SHAPE, 4, float("inf"), load) == shared


def served(clients: int, seconds: float) -> tuple[int, list[float]]:
    """Images in so many simulated seconds, of clients that ask again when they have their image; how long each took."""
    table = costs(0.12)
    planner, now, taken = Planner(table, BatchPolicy(max_batch=4)), 0.0, list[float]()

    def ask(key: int) -> None:
        planner.add(PlannedSequence(key=key, shape=SHAPE, steps=STEPS, claim=Claim(4, now, None)), now)

    for client in range(clients):
        ask(client)
    while now < seconds:
        plan = planner.plan(now)
        assert isinstance(plan, Plan)
        now += planner.expected_seconds(plan)
        planner.advance(plan)
        if plan.stage is Stage.DECODE:
            taken.append(now - plan.sequences[0].claim.arrived)
            ask(plan.sequences[0].key)
    return len(taken), taken


def test_clients_that_keep_asking_are_served_at_the_highest_rate() -> None:
    alone, together = served(1, 60.0), served(8, 60.0)
    assert together[0] > 1.06 * alone[0]
    assert sum(together[1]) / len(together[1]) < 8 * alone[1][0] / 1.06


def overloaded(rate: float, patience: float, seconds: float) -> tuple[int, int, int]:
    """Of requests that come at random, so many a second: how many were answered in time, late, and begun in vain."""
    random_ = random.Random(7)
    table = costs(0.12)
    planner, now, due = Planner(table, BatchPolicy(max_batch=4)), 0.0, 0.0
    good = late = begun_in_vain = 0
    while now < seconds:
        while due <= now:
            claim = Claim(4, due, due + patience)
            planner.add(PlannedSequence(key=int(due * 1e6), shape=SHAPE, steps=STEPS, claim=claim), now)
            due += random_.expovariate(rate)
        for sequence in planner.hopeless(now):
            begun_in_vain += sequence.started
            planner.remove(sequence.key, now)
        plan = planner.plan(now)
        if not isinstance(plan, Plan):
            now = due
            continue
        now += planner.expected_seconds(plan) * random_.uniform(0.97, 1.03)  # no device is as regular as its median
        planner.advance(plan)
        if plan.stage is Stage.DECODE:
            in_time = now <= plan.sequences[0].claim.deadline
            good, late = good + in_time, late + (not in_time)
    return good, late, begun_in_vain


@pytest.mark.parametrize("load", [1.3, 3.0])
def test_an_overload_leaves_the_device_to_what_can_be_done(load: float) -> None:
    """Begun at the last moment that they can be, most would be given up a few steps before their end."""
    most = served(8, 60.0)[0] / 60.0
    good, late, begun_in_vain = overloaded(load * most, 1.0, 60.0)
    assert good >= 0.9 * 60.0 * most
    assert late + begun_in_vain <= 0.06 * good


def test_a_burst_on_an_idle_worker_is_served_in_order() -> None:
    planner = Planner(costs(0.12), BatchPolicy(max_batch=4))
    assert in_order(planner, 0.0)


def test_a_worker_whose_last_request_was_cancelled_is_idle() -> None:
    planner = Planner(costs(0.12), BatchPolicy(max_batch=4))
    planner.add(PlannedSequence(key=9, shape=SHAPE, steps=1, claim=Claim(4, 0.0, None)), 0.0)
    planner.remove(9, 1.0)
    assert in_order(planner, 3600.0)


def in_order(planner: Planner, now: float) -> bool:
    """Whether of three that come at once one is begun when the one before is done."""
    for key in range(3):
        planner.add(PlannedSequence(key=key, shape=SHAPE, steps=1, claim=Claim(4, now, None)), now)
    plans = []
    while isinstance(plan := planner.plan(now), Plan):
        plans.append((plan.stage, [s.key for s in plan.sequences]))
        planner.advance(plan)
    return plans == [(stage, [key]) for key in range(3) for stage in (Stage.ENCODE, Stage.DENOISE, Stage.DECODE)]
