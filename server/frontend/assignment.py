"""Which requests each worker of a model holds, and which goes to which worker next. Policy only, with no clock.

A worker gets enough requests to choose from (its window), but not so many that others idle. It gets one more where less
than a window of what it holds would go before it.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from server.costs import CostTable
from server.errors import ZServeError
from server.frontend.forecast import Forecast, Work, forecasts
from server.frontend.workers import Worker, WorkerState
from server.requests import GenerationRequest, Queued
from server.turns import Claim, Rank

MOST_WINDOWS = 4  # a worker holds at most this many windows, however urgent the next request is


@dataclass(eq=False)
class Place:
    """One request on its way through a `ModelQueue`."""

    request: GenerationRequest
    claim: Claim
    queue_timeout_at: float
    moved: asyncio.Event = field(default_factory=asyncio.Event)  # signals a new `standing`, `worker` or `refused`
    standing: Queued | None = None
    worker: Worker | None = None
    refused: ZServeError | None = None
    started: bool = False  # its worker has started it
    alone: bool = False  # its worker has held no other request since
    steps_done: dict[int, int] = field(default_factory=dict)  # by image index; reset when the request starts over
    attempts: int = 0  # workers it was given to
    losses: int = 0  # of those workers, the ones that were lost
    strikes: int = 0  # of those losses, the ones where the worker had started it, or had it and held no other
    doubts: int = 0  # those where it held no other, and is not known to have had it

    @property
    def suspect(self) -> bool:
        """Whether it may be what ends workers; it then gets one to itself, so that no other request is blamed.

        A request that ends workers before they can report having started it is recognised by losing two of them.
        """
        return self.strikes > 0 or self.losses > 1


class Assignment:
    """Which of `workers` holds which places. `rank` says how urgent a place is now; `window` is in requests."""

    def __init__(self, workers: Sequence[Worker], window: int, rank: Callable[[Place], Rank]) -> None:
        self._workers, self._window, self._rank = workers, window, rank
        self._held: dict[Worker, list[Place]] = {}

    @property
    def running(self) -> int:
        """Requests that a worker has."""
        return sum(map(len, self._held.values()))

    @property
    def unstarted(self) -> int:
        """Those of them that their worker has not started."""
        return sum(not place.started for held in self._held.values() for place in held)

    def ready(self) -> list[Worker]:
        """The workers that serve."""
        return [w for w in self._workers if w.state is WorkerState.READY]

    def held(self, worker: Worker) -> Sequence[Place]:
        """The places that `worker` holds."""
        return self._held.get(worker, ())

    def assign(self, waiting: Sequence[Place]) -> list[Place]:
        """Assigns workers with room to `waiting`, in order; returns the places that got one."""
        reserved: set[Worker] = set()
        given = []
        for place in waiting:
            worker = self._worker_for(place, reserved)
            if worker is not None:
                self._give(place, worker)
                given.append(place)
            elif place.suspect:
                reserved |= set(self._by_end(place)[:1])  # it drains, then takes the suspect alone
            else:
                break
        return given

    def release(self, place: Place) -> None:
        """Takes the place from its worker, if it has one."""
        if place.worker is None:
            return
        self._held[place.worker].remove(place)
        place.worker = None

    def seconds(self, place: Place) -> float:
        """Device time that the request still needs: on its worker, or while it waits, on the one that needs the least.

        While no worker serves, by the costs last known.
        """
        workers = (self.ready() or self._workers) if place.worker is None else [place.worker]
        return min((_seconds(place, worker.costs) for worker in workers), default=0.0)

    def forecasts(self, waiting: Sequence[Place]) -> list[Forecast] | None:
        """When each of `waiting`, the head of the queue, starts, and how long it takes; None while no worker serves."""
        ready = self.ready()
        held = [[Work(self._rank(p), _seconds(p, w.costs)) for p in self.held(w)] for w in ready]
        demands = [_demand(p.request) for p in waiting]  # a thousand may wait, of a few kinds; nothing of them is done
        needed = {demand: [_whole(demand, w.costs) for w in ready] for demand in set(demands)}
        return forecasts([(self._rank(p), needed[d]) for p, d in zip(waiting, demands, strict=True)], held)

    def _give(self, place: Place, worker: Worker) -> None:
        held = self._held.setdefault(worker, [])
        place.alone = not held
        for other in held:
            other.alone = False
        held.append(place)
        place.worker = worker
        place.attempts += 1
        place.moved.set()

    def _worker_for(self, place: Place, reserved: set[Worker]) -> Worker | None:
        """Of the workers with room for `place`, the one that would be the first to be done with it and all it holds."""
        return next((w for w in self._by_end(place) if w not in reserved and self._has_room(w, place)), None)

    def _by_end(self, place: Place) -> list[Worker]:
        def end(worker: Worker) -> tuple[float, int]:
            held = self.held(worker)
            return _seconds(place, worker.costs) + sum(map(self.seconds, held)), len(held)

        return sorted(self.ready(), key=end)

    def _has_room(self, worker: Worker, place: Place) -> bool:
        held = self.held(worker)
        if place.suspect or any(p.suspect for p in held):
            return not held
        rank = self._rank(place)
        ahead = sum(self._rank(p) <= rank for p in held)
        return ahead < self._window and len(held) < MOST_WINDOWS * self._window


class _Demand(NamedTuple):
    """What the device time of a request depends on."""

    height: int
    width: int
    steps: int
    images: int
    rows: int


def _demand(request: GenerationRequest) -> _Demand:
    rows = 2 if request.guided else 1
    return _Demand(request.height, request.width, request.num_inference_steps, request.num_images, rows)


def _whole(demand: _Demand, costs: CostTable) -> float:
    """Device time of the whole request."""
    return demand.images * costs.image(demand.height, demand.width, steps=demand.steps, rows=demand.rows)


def _seconds(place: Place, costs: CostTable) -> float:
    """Device time of what is still to do."""
    demand = _demand(place.request)
    return _whole(demand, costs) * (1 - sum(place.steps_done.values()) / (demand.steps * demand.images))
