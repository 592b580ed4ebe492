"""What each worker of one model has, who gets the next room with one, and when. Policy only; it is given a clock.

A worker gets enough to choose from (its window), not so much that others idle, and always has room for what is more
urgent than all it has.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.costs import CostTable
from server.errors import ZServeError
from server.frontend.forecast import Work, starting_times
from server.frontend.workers import Worker, WorkerState
from server.requests import GenerationRequest, Queued
from server.turns import Claim, Rank

MOST_WINDOWS = 4  # so many windows of ever more urgent requests a worker takes at most


@dataclass(eq=False)
class Place:
    """One request on its way through a `ModelQueue`."""

    request: GenerationRequest
    claim: Claim
    queue_timeout_at: float
    moved: asyncio.Event = field(default_factory=asyncio.Event)  # there is news below
    standing: Queued | None = None
    worker: Worker | None = None
    refused: ZServeError | None = None
    started: bool = False  # its worker has begun with it
    alone: bool = False  # its worker has had nothing else since
    steps_done: dict[int, int] = field(default_factory=dict)  # by image; one that starts again counts anew
    attempts: int = 0  # workers it was given to
    losses: int = 0  # of those, the ones that ended
    strikes: int = 0  # of those in turn, the ones that had begun with it or had nothing else

    @property
    def suspect(self) -> bool:
        """Whether it may be what ends workers: from then on it gets one for itself, so that no other is blamed.

        One that ends them before they can say that they have begun is known by that others suffer beside it, twice.
        """
        return self.strikes > 0 or self.losses > 1


class Assignment:
    """Who has which of `workers`. `rank` says how urgent a place is now; `window` is in requests."""

    def __init__(self, workers: Sequence[Worker], window: int, rank: Callable[[Place], Rank]) -> None:
        self._workers, self._window, self._rank = workers, window, rank
        self._held: dict[Worker, list[Place]] = {}

    @property
    def running(self) -> int:
        """Requests that a worker has."""
        return sum(map(len, self._held.values()))

    @property
    def unstarted(self) -> int:
        """Those of them that their worker has not begun with."""
        return sum(not place.started for held in self._held.values() for place in held)

    def ready(self) -> list[Worker]:
        """The workers that serve."""
        return [w for w in self._workers if w.state is WorkerState.READY]

    def held(self, worker: Worker) -> Sequence[Place]:
        """What `worker` has."""
        return self._held.get(worker, ())

    def assign(self, waiting: Sequence[Place]) -> list[Place]:
        """Gives free workers to `waiting`, in its order; returns those that have got one."""
        reserved: set[Worker] = set()
        given = []
        for place in waiting:
            worker = self._worker_for(place, reserved)
            if worker is not None:
                self._give(place, worker)
                given.append(place)
            elif place.suspect:
                reserved |= set(self._by_load()[:1])  # it empties, and then takes the suspect alone
            else:
                break
        return given

    def release(self, place: Place) -> None:
        """Takes the place from its worker, if it has one."""
        if place.worker is None:
            return
        held = self._held[place.worker]
        held.remove(place)
        if not held:
            del self._held[place.worker]
        place.worker = None

    def seconds(self, place: Place) -> float:
        """Device time that the request still needs: of its worker's device, or of the first one's while it waits.

        While no worker serves, as they did before.
        """
        request = place.request
        rows = 2 if request.guided else 1
        costs = self._costs if place.worker is None else place.worker.costs
        image = costs.image(request.height, request.width, steps=request.num_inference_steps, rows=rows)
        steps = request.num_inference_steps * request.num_images
        return image * request.num_images * (1 - sum(place.steps_done.values()) / steps)

    def forecasts(self, waiting: Sequence[Place]) -> list[float] | None:
        """Seconds until each of `waiting`, the first ones in the queue, starts; None while no worker serves."""
        held = {w: [self._work(p) for p in self.held(w)] for w in self.ready()}
        return starting_times([self._work(place) for place in waiting], held)

    @property
    def _costs(self) -> CostTable:
        return next((w.costs for w in (*self.ready(), *self._workers)), CostTable())

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
        """The worker that has room for `place` and the least to do."""
        return next((w for w in self._by_load() if w not in reserved and self._has_room(w, place)), None)

    def _by_load(self) -> list[Worker]:
        return sorted(self.ready(), key=lambda w: (sum(map(self.seconds, self.held(w))), len(self.held(w))))

    def _has_room(self, worker: Worker, place: Place) -> bool:
        held = self.held(worker)
        if place.suspect or any(p.suspect for p in held):
            return not held
        rank = self._rank(place)
        ahead = sum(self._rank(p) <= rank for p in held)
        return ahead < self._window and len(held) < MOST_WINDOWS * self._window

    def _work(self, place: Place) -> Work:
        return Work(self._rank(place), self.seconds(place))
