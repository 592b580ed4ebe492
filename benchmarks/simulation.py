"""How does the policy do on 1, 2, 4 and 8 GPUs, up to 95 % load and far past it? Simulated with an H200's step costs.

Method: the server's own `ModelQueue` and `Planner`, a clock that jumps from event to event, and devices that take as
long as the cost table says. The table was measured on one H200 with the real model's shapes in bf16 (1024x1024: 93.5 ms
a step, 94.5 ms an image in pairs; 512x512: 24.2, 21.9 in fours; decoding 34.8 ms; a prompt 26 ms); batches of four at
1024x1024 and pairs at 512x512 are interpolated. Baseline: `FifoPlanner`, request-level batching by arrival, without
priorities and deadlines. Load 1 is one image after the other on every GPU. 30 % of the images are 512x512. 3,000
requests count, after a warm-up of twice the longest patience.

Units: milliseconds, requests a second. `throughput` and `goodput` are the answers, and those before their client lost
patience, given while requests came, over that time; percentiles are of all requests, None where they fall among those
without an answer; `good` is the share of requests answered in time, whenever that was.
"""

import argparse
import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.fifo import FifoPlanner
from benchmarks.record import Row, row
from benchmarks.workload import METHOD, Arrival, Mix, Outcome, open_summary, poisson
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
STEP_SECONDS = {1024: {1: 0.0935, 2: 0.189, 4: 0.376}, 512: {1: 0.0242, 2: 0.0460, 4: 0.0876}}
H200 = (
    *(StepCost(size, size, rows, s) for size, by_rows in STEP_SECONDS.items() for rows, s in by_rows.items()),
    StepCost(1024, 1024, 1, 0.0348, Component.IMAGE_DECODER),
    StepCost(512, 512, 1, 0.0087, Component.IMAGE_DECODER),
    StepCost(0, 0, 1, 0.026, Component.PROMPT_ENCODER),
)
IMAGE_SECONDS = {size: CostTable(H200).image(*size, steps=STEPS, rows=1) for size in SIZES}
MEAN_SECONDS = sum(share * IMAGE_SECONDS[size] for size, share in SIZES.items())


@dataclass(eq=False)
class Gpu:
    """A device with its planner, and as much of a worker as `ModelQueue` needs."""

    planner: Planner
    costs: CostTable = field(default_factory=lambda: CostTable(H200))
    state: WorkerState = WorkerState.READY
    running: Plan | None = None


class Simulation:
    """One policy on some GPUs under some load."""

    def __init__(self, policy: type[Planner], gpus: int) -> None:
        self.now = 0.0
        self._deadlines = policy is Planner
        batches = BatchPolicy(max_batch=4)
        self._gpus = [Gpu(policy(CostTable(H200), batches)) for _ in range(gpus)]
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
            encode = 0.026 if plan.stage is Stage.ENCODE else 0.0
            seconds = gpu.planner.expected_seconds(plan) + encode
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


async def simulate(policy: str, gpus: int, load: float) -> Row:
    """Simulates one point; the queue needs an event loop, though nothing here waits."""
    rate = load * gpus / MEAN_SECONDS
    seconds = REQUESTS / rate
    arrivals = poisson(rate, seconds, Mix(SIZES, unit=IMAGE_SECONDS[1024, 1024]), seed=7)
    outcomes = Simulation(POLICIES[policy], gpus).run(arrivals)
    assert len(outcomes) == len(arrivals), "every request ends once"
    return row({"gpus": gpus, "load": load, "policy": policy}, **open_summary(outcomes, seconds))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Simulates and prints all points."""
    rows = [asyncio.run(simulate(p, g, load)) for g in GPUS for load in LOADS for p in POLICIES]
    for point in rows:
        case = point["case"]
        good = "  ".join(f"{kind} {values['good']:6.1%}" for kind, values in point["by_kind"].items())
        print(f"{case['gpus']} GPU {case['load']:4} {case['policy']:8} goodput {point['goodput']:6.2f}/s  {good}")
    return {"settings": {**METHOD, "step_seconds": {str(k): v for k, v in STEP_SECONDS.items()}}, "rows": rows}
