"""The real worker with engines that fail: a request's width says how, FAULTY_LOAD and FAULTY_WARM_UP which one fails at
the start. A prompt that is as long as may be hangs while it is encoded.
"""

import os
import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from export.manifest import EngineRecord
from export.spec import MAX_PROMPT_TOKENS, PIXELS_PER_LATENT, Component, ComponentSpec
from server.engines.base import Engine, Shapes
from server.engines.load import EngineLoader
from server.worker import main as worker
from server.worker.loop import WorkerLoop
from server.worker.planner import Plan

HANGS, STARVES, OVERFLOWS, TOO_LARGE_TOGETHER = (96, 112, 128, 144)  # widths in pixels


class FaultyEngine:
    """An engine that does as the size tells it."""

    def __init__(self, engine: Engine, component: Component) -> None:
        self._engine, self._component = engine, component
        self.backend = engine.backend

    def fits(self, shapes: Shapes) -> bool:
        return self._engine.fits(shapes)

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if os.environ.get("FAULTY_WARM_UP") == self._component:
            os.abort()
        if self._component is Component.PROMPT_ENCODER and inputs["input_ids"].shape[1] == MAX_PROMPT_TOKENS:
            time.sleep(600)
        output = self._engine.run(inputs)
        return self._spoil(output) if self._component is Component.DENOISER else output

    def close(self) -> None:
        self._engine.close()

    def _spoil(self, output: Tensor) -> Tensor:
        rows, width = output.shape[0], output.shape[-1] * PIXELS_PER_LATENT
        match width:
            case _ if width == HANGS:
                time.sleep(600)
            case _ if width == STARVES or (width == TOO_LARGE_TOGETHER and rows > 1):
                raise torch.OutOfMemoryError("tried to allocate 900 GiB")
            case _ if width == OVERFLOWS:
                return output * float("nan")
        return output


class FaultyLoader(EngineLoader):
    """Loads the real engines and spoils them."""

    def _compiled(self, record: EngineRecord, spec: ComponentSpec) -> Engine:
        if os.environ.get("FAULTY_LOAD") == spec.component:
            os.abort()
        return FaultyEngine(super()._compiled(record, spec), spec.component)


class FaultyLoop(WorkerLoop):
    """Gives up at once on what is known to hang, and on nothing else however slow the machine is."""

    def _run(self, plan: Plan) -> None:
        _, width, captions = plan.sequences[0].shape
        self._watchdog.patience = 0.2 if width == HANGS or MAX_PROMPT_TOKENS in captions else 600.0
        super()._run(plan)


if __name__ == "__main__":
    worker.EngineLoader = FaultyLoader  # type: ignore[misc]
    worker.WorkerLoop = FaultyLoop  # type: ignore[misc]
    sys.exit(worker.main())
