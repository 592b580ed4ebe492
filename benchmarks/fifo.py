"""The baseline of the planner: request-level batching, first in, first out.

The oldest request and as many equal ones as wait, up to the largest batch, run together from their first step to their
last. No priorities, no deadlines, no joining later: what a dynamic batcher in front of a whole pipeline does.
"""

import sys

from server.worker import main as worker
from server.worker.planner import Plan, PlannedSequence, Planner, Stage


class FifoPlanner(Planner):
    """A planner that batches whole requests in the order of their arrival."""

    _batch: tuple[PlannedSequence, ...] = ()

    def plan(self, now: float) -> Plan | None:
        """What to run next; None when there is nothing to do."""
        waiting = sorted(self._turns.ordered(now), key=lambda s: s.claim.arrived)
        alive = tuple(s for s in self._batch if s in waiting)
        self._batch = alive or self._next_batch(waiting)
        for stage in (Stage.ENCODE, Stage.DECODE):
            due = next((s for s in self._batch if s.stage is stage), None)
            if due is not None:
                return Plan(stage, (due,))
        return Plan(Stage.DENOISE, self._batch) if self._batch else None

    def hopeless(self, now: float, free: float = 0.0) -> list[PlannedSequence]:
        """None: it knows no deadlines."""
        return []

    def _next_batch(self, waiting: list[PlannedSequence]) -> tuple[PlannedSequence, ...]:
        if not waiting:
            return ()
        first = waiting[0]
        equal = [s for s in waiting if (s.shape, s.steps) == (first.shape, first.steps)]
        return tuple(equal[: self._batching.largest(first.shape)])


if __name__ == "__main__":  # a worker process with this planner
    worker.Planner = FifoPlanner  # type: ignore[attr-defined]
    sys.exit(worker.main())
