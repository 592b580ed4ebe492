"""What becomes of the images whose work on the device has failed: tried again, or their requests answered.

An engine's own failures do not come here: eager repeats such calls (`server.engines.served`).
"""

import logging
from collections.abc import Callable

import torch

from export.spec import Component
from server.engines.memory import out_of_memory_error
from server.errors import NonFiniteError
from server.worker.events import Failed
from server.worker.executor import Executor
from server.worker.planner import Plan, Planner
from server.worker.reports import Reports
from server.worker.under_way import images_of

log = logging.getLogger(__name__)


class Failures:
    """Decides what becomes of failed plans; unless the device is lost, the loop goes on."""

    def __init__(self, executor: Executor, planner: Planner, reports: Reports, clock: Callable[[], float]) -> None:
        self._executor, self._planner, self._reports, self._clock = executor, planner, reports, clock
        self.device_lost = False  # then the loop ends, and another worker starts its requests over

    def handle(self, plan: Plan, error: Exception) -> list[Plan]:
        """Plans to run now instead of `plan`; what the planner is to try again comes with its next plans.

        To be called while nothing runs on the device: this may free memory, and checks whether the device still works.
        """
        match error:
            case NonFiniteError():
                self._start_again(plan, error)
            case torch.OutOfMemoryError():
                self._retry_smaller(plan, error)
            case _ if len(plan.sequences) > 1:
                return [Plan(plan.stage, (s,)) for s in plan.sequences]  # so that none fails because of another
            case _:
                self.give_up(plan, error)
        return []

    def give_up(self, plan: Plan, error: Exception) -> None:
        """Fails the plan's requests, unless it was the device that failed."""
        if not self._executor.usable():
            log.critical("the device cannot be used any more, so this worker ends: %s", error)
            self.device_lost = True
            return
        for sequence in plan.sequences:
            self.fail(sequence.key, error)

    def fail(self, key: int, error: Exception) -> None:
        """Answers the request with `error`, once, and takes all its sequences out."""
        self._reports.note(key, Failed(error))
        self._reports.forget(key)
        self._planner.remove(key, self._clock())

    def _start_again(self, plan: Plan, error: NonFiniteError) -> None:
        """Restarts the sequences from their noise, on eager; one that has been restarted before fails."""
        self._executor.quarantine(Component.DENOISER, str(error))
        for sequence in images_of(plan):
            if sequence.restarted:
                self.fail(sequence.key, error)
                continue
            try:
                self._executor.reset(sequence)
            except Exception as fault:  # noqa: BLE001 - the boundary between one request and the others
                self.handle(Plan(plan.stage, (sequence,)), fault)
                continue
            sequence.restarted = True
            self._planner.restart(sequence)

    def _retry_smaller(self, plan: Plan, error: torch.OutOfMemoryError) -> None:
        """Frees what can be freed and halves the batch; a sequence that does not fit alone is tried once more."""
        refusal = out_of_memory_error(error)
        first, *others = sequences = images_of(plan)
        log.warning("out of memory with %d of %s: %s", len(sequences), first.shape, refusal)
        self._executor.free_memory()
        if others:
            self._planner.limit_batch(first.shape, len(sequences) // 2)
            return
        if first.starved:
            self.fail(first.key, refusal)
        first.starved = True
