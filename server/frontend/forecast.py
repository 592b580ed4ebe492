"""When waiting requests will start, and how long they then take: plain arithmetic on ranks and seconds."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from server.turns import Rank

W = TypeVar("W", bound=Hashable)


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


def forecasts(
    waiting: Sequence[tuple[Rank, Mapping[W, float]]], held: Mapping[W, Sequence[Work]]
) -> list[Forecast] | None:
    """A forecast for each of `waiting`, the next one first: ranks, and the seconds that each needs on each worker.

    Each takes the worker that will be done with it first. Of what a worker holds, only what is at least as urgent goes
    ahead. None without workers.
    """
    if not held:
        return None
    free = dict.fromkeys(held, 0.0)
    ahead = sorted(((work, worker) for worker, works in held.items() for work in works), key=lambda entry: entry[0])
    found = []
    for rank, needed in waiting:
        while ahead and ahead[0][0].rank <= rank:
            work, worker = ahead.pop(0)
            free[worker] += work.seconds
        ends = {worker: start + needed[worker] for worker, start in free.items()}
        first = min(ends, key=ends.__getitem__)
        found.append(Forecast(free[first], needed[first]))
        free[first] = ends[first]
    return found
