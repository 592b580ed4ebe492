"""Runs every configured shape before the worker says it is ready, and measures what each stage costs."""

import logging
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log2

import torch

from export.spec import (
    CAPTION_MULTIPLE,
    Component,
    ComponentSpec,
    ModelDimensions,
    ShapePoint,
    component_specs,
    example_inputs,
)
from server.config import ModelConfig, Size
from server.costs import CostTable
from server.requests import StepCost
from server.worker.executor import Executor

log = logging.getLogger(__name__)

REPEATS = 3
# Seconds. Larger batches are tried only while a step takes less: beyond it one image fills the device, sharing a step
# gains a few percent at most, and warming it up would take longer than it could ever save.
LONGEST_SHARED_STEP = 0.5
# The same holds where twice the rows took nearly twice as long (`FULL`), unless the step is shorter than `SHORT_STEP`
# seconds: such times scatter too much to tell.
FULL, SHORT_STEP = 1.9, 0.15


class WarmUp:
    """Warm-up of one executor. `announce` is told which component runs next, in case that ends the process.

    `captions`: the prompt lengths in tokens to run, of which the first is measured. `preparing`: how many initial calls
    of a shape are not representative.
    """

    def __init__(
        self,
        executor: Executor,
        dimensions: ModelDimensions,
        announce: Callable[[Component], None],
        captions: Sequence[int] = (CAPTION_MULTIPLE,),
        preparing: int = 1,
    ) -> None:
        self._executor = executor
        self._dimensions = dimensions
        self._announce = announce
        self._captions, self._preparing = captions, preparing
        self._specs = component_specs(dimensions)

    def run(self, model: ModelConfig, costs: CostTable) -> None:
        """Runs all sizes of `model`; `costs` receives every size and batch that was run."""
        for caption in sorted({2 * CAPTION_MULTIPLE, *self._captions}, reverse=True):
            taken = self._time(Component.PROMPT_ENCODER, ShapePoint(1, caption, *model.default_size))
        for seconds in taken:
            costs.observe(StepCost(0, 0, 1, seconds, Component.PROMPT_ENCODER))
        # The default size last: of more shapes than an engine keeps recordings of, it keeps the last (`recorded.MOST`).
        for size in reversed(dict.fromkeys((model.default_size, *model.warmup_sizes))):
            self._run_size(size, rows_to_try(model), costs)

    def _run_size(self, size: Size, every: Sequence[int], costs: CostTable) -> None:
        width, height = size
        for seconds in self._time(Component.IMAGE_DECODER, ShapePoint(1, CAPTION_MULTIPLE, height, width)):
            costs.observe(StepCost(height, width, 1, seconds, Component.IMAGE_DECODER))
        for fewer, rows in pairwise((0, *every)):
            measured, *others = (ShapePoint(rows, caption, height, width) for caption in self._captions)
            try:
                for seconds in self._time(Component.DENOISER, measured):
                    costs.observe(StepCost(height, width, rows, seconds))
                for point in others:
                    self._prepared(Component.DENOISER, point)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                log.warning("%dx%d: no memory for steps of %d rows, so larger ones are not tried", width, height, rows)
                break
            if _is_enough(costs, size, fewer, rows):
                break

    def _time(self, component: Component, point: ShapePoint) -> list[float]:
        """Seconds of each of `REPEATS` calls, after the preparing ones."""
        self._announce(component)
        call = self._prepared(component, point)
        return [_seconds(call) for _ in range(REPEATS)]

    def _prepared(self, component: Component, point: ShapePoint) -> Callable[[], object]:
        """A call of this shape, returned once its preparing calls have been made."""
        call = self._call(self._specs[component], point)
        for _ in range(self._preparing):
            call()
        return call

    def _call(self, spec: ComponentSpec, point: ShapePoint) -> Callable[[], object]:
        inputs = example_inputs(spec, point, self._dimensions)

        def call() -> object:
            try:
                return self._executor.run(spec.component, inputs)
            except torch.OutOfMemoryError:  # engines may keep memory for other shapes that this one needs
                self._executor.free_memory()
                return self._executor.run(spec.component, inputs)

        return call


def rows_to_try(model: ModelConfig) -> list[int]:
    """Rows of a step that warm-up measures, ascending: no other batches are ever shared.

    Powers of two, the largest batch and the preferred ones; and twice each of these, because guidance doubles the rows.
    """
    largest = model.max_batch_size
    batches = {largest, *(b for b in model.queue.preferred_batch_sizes if b <= largest)}
    batches |= {1 << power for power in range(largest.bit_length())}
    return sorted(batches | {2 * batch for batch in batches})


def _is_enough(costs: CostTable, size: Size, fewer: int, rows: int) -> bool:
    """Whether steps with more rows would gain next to nothing."""
    width, height = size
    step = costs.step(height, width, rows)
    alike = FULL ** log2(rows / fewer) * costs.step(height, width, fewer) if fewer else step
    return step > max(SHORT_STEP, alike) or step > LONGEST_SHARED_STEP


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
