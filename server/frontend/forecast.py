"""When waiting requests will start, and how long they then take: plain arithmetic on ranks and seconds."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from server.turns import Rank


@dataclass(frozen=True, order=True)
class Work:
    """A request's turn, and the device time it still needs."""

    rank: Rank
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """Seconds until a request starts, and seconds that it then takes on its worker."""

    start: float
    takes: float


def forecasts(waiting: Sequence[tuple[Rank, Sequence[float]]], held: Sequence[Sequence[Work]]) -> list[Forecast] | None:
    """A forecast for each of `waiting`, the next one first: ranks, and the seconds that each needs by worker.

    `held` is what each worker has; of that, only what is at least as urgent goes ahead. Each request takes the worker
    that will be done with it first. None without workers.
    """
    if not held:
        return None
    free = [0.0] * len(held)
    ahead = sorted(((work, worker) for worker, works in enumerate(held) for work in works), reverse=True)
    found = []
    for rank, needed in waiting:
        while ahead and ahead[-1][0].rank <= rank:
            work, worker = ahead.pop()
            free[worker] += work.seconds
        ends = list(map(operator.add, free, needed))
        end = min(ends)
        worker = ends.index(end)
        found.append(Forecast(free[worker], needed[worker]))
        free[worker] = end
    return found
