"""Work that the device has been given and has not finished: a step, and plans beside it."""

from dataclasses import dataclass
from typing import cast

from server.worker.images import Pixels
from server.worker.lanes import Pending
from server.worker.planner import Plan
from server.worker.sequences import ImageSequence


@dataclass(eq=False)
class Step:
    """A step, and what to report when it is done: each sequence's step number, and its preview if any."""

    plan: Plan
    pending: Pending[float]
    taken: list[tuple[ImageSequence, int, Pending[Pixels] | None]]
    began: float  # when it was given to the device, or the step before it was seen done
    alone: bool  # whether it has had the device to itself


@dataclass(eq=False)
class SideTask:
    """A plan that runs beside the steps, for its one sequence."""

    plan: Plan
    sequence: ImageSequence
    pending: Pending[Pixels] | Pending[None]
    began: float
    alone: bool  # whether it has had the device to itself


def images_of(plan: Plan) -> list[ImageSequence]:
    """The plan's sequences: the loop gives the planner no others."""
    return list(cast("tuple[ImageSequence, ...]", plan.sequences))
