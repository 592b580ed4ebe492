"""How many equal sequences share a step, decided from the cost table: a batch is not a goal in itself.

One image at 1024x1024 fills a GPU, so sharing a step delays the first of two images and pays off only when many wait
or many more are coming; at 256x256 it nearly always pays off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.costs import CostTable


class StepShape(NamedTuple):
    """Sequences of equal shape may share a step. Size in pixels; `captions` in padded tokens, one a row.

    A guided sequence has two rows, its prompt's and its negative prompt's.
    """

    height: int
    width: int
    captions: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the denoiser that one sequence takes."""
        return len(self.captions)

    @property
    def one_forward(self) -> bool:
        """Whether all its rows fit one forward, whose captions are equally long."""
        return len(set(self.captions)) == 1


@dataclass(frozen=True)
class BatchPolicy:
    """Limits on sharing, named as in Triton. When enough wait for a `preferred` size, only those and 1 are used."""

    max_batch: int = 4
    preferred: tuple[int, ...] = ()
    max_delay: float = 0.0  # seconds that the first of a batch may wait for company


class Batching:
    """Chooses batch sizes from the cost table."""

    def __init__(self, costs: CostTable, policy: BatchPolicy) -> None:
        self._costs, self._policy = costs, policy
        self._limits: dict[StepShape, int] = {}

    @property
    def max_delay(self) -> float:
        """Seconds that the first of a batch may wait for company."""
        return self._policy.max_delay

    def limit(self, shape: StepShape, count: int) -> None:
        """Caps steps of this shape at `count` sequences: there was no memory for more."""
        self._limits[shape] = count

    def largest(self, shape: StepShape) -> int:
        """The most sequences of `shape` that may share a step."""
        return self._limits.get(shape, self._policy.max_batch)

    def seconds(self, shape: StepShape, count: int) -> float:
        """Seconds that a step of `count` sequences takes."""
        if shape.one_forward:
            return self._costs.step(shape.height, shape.width, count * shape.rows)
        return shape.rows * self._costs.step(shape.height, shape.width, count)

    def count(self, shape: StepShape, waiting: int, most_seconds: float, load: float = 0.0) -> int:
        """How many of `waiting` equal sequences should share the next step.

        Served `k` at a time, n equal jobs finish on average after (n / k + 1) / 2 times the cost of a shared step, and
        the last of them after n / k times it, which is how long later arrivals wait. If the device is busy for a share
        `load` of the time, n load / (1 - load) of these arrive before the queue is empty (the busy period started by n
        customers: Kleinrock, Queueing Systems I, 5.8). The `k` with the lowest total cost wins: without load the one
        that serves the n best, under high load the one with the highest throughput. With a step longer than
        `most_seconds`, the first one would miss its deadline.
        """
        sizes = self._sizes(shape, waiting)
        in_time = [k for k in sizes if self.seconds(shape, k) <= most_seconds] or sizes[:1]
        later = load / (1 - load)  # arrivals for each that waits
        return min(in_time, key=lambda k: self.seconds(shape, k) * ((waiting / k + 1) / 2 + later * waiting / k))

    def _sizes(self, shape: StepShape, waiting: int) -> Sequence[int]:
        """The sizes to choose from, ascending: the measured ones, or of these only 1 and the preferred, if any."""
        measured = self._costs.measured(shape.height, shape.width)
        rows = shape.rows if shape.one_forward else 1
        most = min(waiting, self.largest(shape))
        sizes = [k for k in range(1, most + 1) if k == 1 or k * rows in measured]
        preferred = [k for k in sizes if k in self._policy.preferred]
        return sorted({1, *preferred}) if preferred else sizes
