"""When waiting requests will start: plain arithmetic on ranks and seconds."""

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


def starting_times(waiting: Sequence[Work], held: Mapping[W, Sequence[Work]]) -> list[float] | None:
    """Seconds until each of `waiting`, the next one first, starts; None without workers.

    Each takes the worker that is free for it first: of what a worker holds, only what is at least as urgent goes ahead.
    """
    if not held:
        return None
    free = dict.fromkeys(held, 0.0)
    ahead = sorted(((work, worker) for worker, works in held.items() for work in works), key=lambda entry: entry[0])
    starts = []
    for own in waiting:
        while ahead and ahead[0][0].rank <= own.rank:
            work, worker = ahead.pop(0)
            free[worker] += work.seconds
        first = min(free, key=lambda worker: free[worker])
        starts.append(free[first])
        free[first] += own.seconds
    return starts
