"""How does the policy do on 1, 2, 4 and 8 GPUs, up to 95 % load and far past it? Simulated with an H200's step costs.

Method: the server's own `ModelQueue` and `Planner`, a clock that jumps from event to event, and devices that take as
long as the cost table says. The table is of one H200 with the real model's shapes in bf16: the medians of AOTInductor's
rows in benchmarks/results/components_h200.json. That record has one image a call; what shared steps cost beside it was
measured earlier (pairs at 1024x1024: 1 % more an image, fours at 512x512: 10 % less), and fours at 1024x1024 and pairs
at 512x512 are interpolated. Prompts are encoded and images decoded between steps. Baseline: `FifoPlanner`, batching of
whole requests by arrival, without priorities and deadlines. Load 1 is one image after the other on every GPU. 30 % of
the images are 512x512. 3,000 requests count, after a warm-up of twice the longest patience.

Units: milliseconds, requests a second. `throughput` and `goodput` are the answers, and those before their client lost
patience, given while requests came, over that time; percentiles are of all requests, None where they fall among those
without an answer; `good` is the share of requests answered in time, whenever that was.
"""

import argparse
import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.fifo import FifoPlanner
from benchmarks.record import BenchmarkError, Record, Row, case_name, read, row
from benchmarks.workload import METHOD, Arrival, Mix, Outcome, open_summary, poisson
from export.manifest import Backend
from export.spec import Component
from server.config import ModelConfig
from server.costs import CostTable
from server.errors import DeadlinePassedError, ZServeError
from server.frontend.assignment import Place
from server.frontend.queue import ModelQueue
from server.frontend.workers import WorkerState
from server.requests import GenerationRequest, StepCost
from server.turns import Claim
from server.worker.batching import BatchPolicy, StepShape
from server.worker.planner import Plan, PlannedSequence, Planner, Stage
from verify.painter import one_image

GPUS, LOADS = (1, 2, 4, 8), (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 3.0)
SIZES = {(1024, 1024): 0.7, (512, 512): 0.3}
STEPS = 8
REQUESTS = 3000
POLICIES: dict[str, type[Planner]] = {"planner": Planner, "fifo": FifoPlanner}
MEASURED = Path(__file__).parent / "results" / "components_h200.json"
# A step of several images over a step of one. The record has no shared steps; these are from 93.5 ms for one image at
# 1024x1024 and 94.5 for each of two, and 24.2 at 512x512 and 21.9 for each of four.
SHARED = {(1024, 1024): {1: 1.0, 2: 2.02, 4: 4.02}, (512, 512): {1: 1.0, 2: 1.90, 4: 3.62}}


def device_costs(measured: Record) -> tuple[StepCost, ...]:
    """The costs of a GPU by a record of `zserve bench components`, shared steps by `SHARED`.

    Raises:
        BenchmarkError: the record lacks one of the components at one of the sizes.
    """

    def seconds(component: Component, size: str) -> float:
        case = {"component": component, "size": size, "batch": 1, "engine": Backend.AOTINDUCTOR}
        for r in measured["rows"]:
            if r["case"] == case:
                return float(r["ms"]["p50"]) / 1e3
        raise BenchmarkError(f"the record of components has no row of {case_name(case)}; measure it")

    costs = [StepCost(0, 0, 1, seconds(Component.PROMPT_ENCODER, "any"), Component.PROMPT_ENCODER)]
    for (width, height), shared in SHARED.items():
        size = f"{width}x{height}"
        step = seconds(Component.DENOISER, size)
        costs += [StepCost(height, width, rows, step * steps) for rows, steps in shared.items()]
        decode = seconds(Component.IMAGE_DECODER, size)
        costs.append(StepCost(height, width, 1, decode, Component.IMAGE_DECODER))
    return tuple(costs)


@dataclass(eq=False)
class Gpu:
    """A device with its planner, and as much of a worker as `ModelQueue` needs."""

    planner: Planner
    costs: CostTable
    state: WorkerState = WorkerState.READY
    running: Plan | None = None


class Simulation:
    """One policy on some GPUs of the same costs, under some load."""

    def __init__(self, policy: type[Planner], gpus: int, costs: Sequence[StepCost]) -> None:
        self.now = 0.0
        self._deadlines = policy is Planner
        batches = BatchPolicy(max_batch=4)
        self._gpus = [Gpu(policy(CostTable(costs), batches), CostTable(costs)) for _ in range(gpus)]
        self._queue = ModelQueue(ModelConfig("z"), self._gpus, lambda: self.now)  # type: ignore[arg-type]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._waiting: dict[Place, Arrival] = {}
        self._running: dict[int, tuple[Place, Arrival]] = {}
        self.outcomes: list[Outcome] = []

    def run(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Runs until the last request has ended."""
        for arrival in arrivals:
            self._at(arrival.at, lambda a=arrival: self._arrive(a))  # type: ignore[misc]
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
            self._settle()
        return self.outcomes

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), happen))

    def _arrive(self, arrival: Arrival) -> None:
        try:
            place = self._queue.enter(self._request(arrival))
        except ZServeError as error:
            self.outcomes.append(Outcome(arrival, None, error.status.name))
        else:
            self._waiting[place] = arrival
            patience = self._queue.patience(place)
            if patience is not None:
                self._at(self.now + patience + 1e-6, lambda: None)  # to check on it then

    def _settle(self) -> None:
        """Requests that waited too long leave, those with a GPU go to it, and idle GPUs start their next plan."""
        for place in list(self._waiting):
            if place.worker is not None:
                self._submit(place, self._waiting.pop(place))
            elif self._queue.patience(place) == 0:
                self._give_up(place)
        for gpu in self._gpus:
            if gpu.running is None:
                self._begin(gpu)

    def _give_up(self, place: Place) -> None:
        try:
            self._queue.time_out(place)
        except ZServeError as error:
            self.outcomes.append(Outcome(self._waiting.pop(place), None, error.status.name))
            self._queue.leave(place)

    def _submit(self, place: Place, arrival: Arrival) -> None:
        gpu: Any = place.worker
        key = next(self._numbers)
        claim = Claim(place.claim.priority, self.now, place.claim.deadline)
        width, height = arrival.size
        shape = StepShape(height, width, (64,))
        gpu.planner.add(PlannedSequence(key, shape, STEPS, claim), self.now)
        self._running[key] = place, arrival

    def _begin(self, gpu: Gpu) -> None:
        for late in gpu.planner.hopeless(self.now):
            gpu.planner.remove(late.key, self.now)
            self._end(late.key, None, DeadlinePassedError.status.name)
        plan = gpu.planner.plan(self.now)
        if isinstance(plan, Plan):
            gpu.running = plan
            encodes = plan.stage is Stage.ENCODE  # which the planner takes for nothing
            seconds = gpu.costs.encode() if encodes else gpu.planner.expected_seconds(plan)
            self._at(self.now + seconds, lambda: self._done(gpu, plan))

    def _done(self, gpu: Gpu, plan: Plan) -> None:
        gpu.running = None
        gpu.planner.advance(plan)
        for sequence in plan.sequences:
            place, arrival = self._running[sequence.key]
            place.started, place.steps_done = True, {0: sequence.step}
            if plan.stage is Stage.DECODE:
                self._end(sequence.key, self.now - arrival.at)

    def _end(self, key: int, latency: float | None, status: str = "OK") -> None:
        place, arrival = self._running.pop(key)
        self.outcomes.append(Outcome(arrival, latency, status))
        self._queue.leave(place)

    def _request(self, arrival: Arrival) -> GenerationRequest:
        request = one_image("", arrival.size, STEPS)
        return replace(request, priority=arrival.priority, timeout=arrival.patience) if self._deadlines else request


async def simulate(policy: str, gpus: int, load: float, costs: Sequence[StepCost]) -> Row:
    """Simulates one point; the queue needs an event loop, though nothing here waits."""
    table = CostTable(costs)
    image = {(width, height): table.image(height, width, steps=STEPS, rows=1) for width, height in SIZES}
    rate = load * gpus / sum(share * image[size] for size, share in SIZES.items())
    seconds = REQUESTS / rate
    arrivals = poisson(rate, seconds, Mix(SIZES, unit=max(image.values())), seed=7)
    outcomes = Simulation(POLICIES[policy], gpus, costs).run(arrivals)
    assert len(outcomes) == len(arrivals), "every request ends once"
    return row({"gpus": gpus, "load": load, "policy": policy}, **open_summary(outcomes, seconds))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Simulates and prints all points.

    Raises:
        BenchmarkError: the record that the costs are taken from cannot be read.
    """
    measured = read(MEASURED)
    costs = device_costs(measured)
    rows = [asyncio.run(simulate(p, g, load, costs)) for g in GPUS for load in LOADS for p in POLICIES]
    for point in rows:
        case = point["case"]
        good = "  ".join(f"{kind} {values['good']:6.1%}" for kind, values in point["by_kind"].items())
        print(f"{case['gpus']} GPU {case['load']:4} {case['policy']:8} goodput {point['goodput']:6.2f}/s  {good}")
    origin = {"record": MEASURED.name, **{key: measured[key] for key in ("commit", "date")}}
    settings = {**METHOD, "costs_of": origin, "costs": [asdict(cost) for cost in costs]}
    return {"settings": settings, "rows": rows}
