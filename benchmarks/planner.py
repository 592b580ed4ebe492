"""How long does the planner take for its part of every step, with 1,000 sequences queued?

Method: 1,000 sequences of three shapes and eight priorities, half of them with deadlines, of many ages so that levels
keep changing. 2,000 decisions in a row, each with what the loop does around it: drop the hopeless, plan, note what was
run; finished sequences are replaced. Also the forecast for those that wait, made only when positions have changed.

Units: milliseconds.
"""

import argparse
import random
import time
from typing import Any

from benchmarks.record import percentiles, print_table, row, shown
from server.costs import CostTable
from server.requests import StepCost
from server.turns import Claim
from server.worker.batching import BatchPolicy, StepShape
from server.worker.planner import Plan, PlannedSequence, Planner

QUEUED, DECISIONS, STEP_SECONDS = 1000, 2000, 0.05
SHAPES = (StepShape(256, 256, (32,)), StepShape(1024, 1024, (64,)), StepShape(256, 256, (32, 32)))
COSTS = [StepCost(size, size, rows, 1e-8 * size * size * (1 + rows)) for size in (256, 1024) for rows in (1, 2, 4, 8)]


class Crowd:
    """A planner that always holds `QUEUED` sequences."""

    def __init__(self) -> None:
        self.now = 100.0
        self._rng = random.Random(1)
        self.planner = Planner(CostTable(COSTS), BatchPolicy(max_batch=8))
        for key in range(QUEUED):
            self.arrive(key, age=100.0 * self._rng.random())

    def arrive(self, key: int, age: float = 0.0) -> None:
        """Adds one sequence."""
        deadline = None if self._rng.random() < 0.5 else self.now + 1e4
        claim = Claim(self._rng.randint(1, 8), self.now - age, deadline)
        self.planner.add(PlannedSequence(key, self._rng.choice(SHAPES), 8, claim), self.now)

    def decide(self, key: int) -> float:
        """Milliseconds of one decision."""
        began = time.perf_counter()
        self.planner.hopeless(self.now)
        plan = self.planner.plan(self.now)
        assert isinstance(plan, Plan), "there is always something to do"
        self.planner.advance(plan)
        taken = time.perf_counter() - began
        self.now += STEP_SECONDS
        while len(self.planner) < QUEUED:
            self.arrive(key)
        return 1e3 * taken

    def forecast(self) -> float:
        """Milliseconds of one forecast for all."""
        began = time.perf_counter()
        self.planner.forecast(self.now)
        return 1e3 * (time.perf_counter() - began)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints decisions and forecasts."""
    crowd = Crowd()
    taken = {
        "decision": [crowd.decide(QUEUED + number) for number in range(DECISIONS)],
        "forecast": [crowd.forecast() for _ in range(50)],
    }
    rows = [row({"what": what}, ms=percentiles(values), max_ms=max(values)) for what, values in taken.items()]
    print_table(("what", "p50 ms", "p99 ms"), [(r["case"]["what"], *shown(r["ms"], 50, 99)) for r in rows])
    return {"settings": {"queued": QUEUED}, "rows": rows}
