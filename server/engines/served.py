"""A component as it is served: its engine, with eager as the fallback."""

import logging
from collections.abc import Callable, Mapping

from torch import Tensor

from export.manifest import Backend
from export.spec import ComponentSpec
from server.engines.base import Engine, KeepsKernels, KeepsMemory
from server.errors import EngineRunError
from server.requests import EngineUse

log = logging.getLogger(__name__)


class ServedComponent:
    """Runs the engine; when it fails, runs eager for that call and from then on.

    `eager` makes the fallback when it is first needed, so weights that no engine borrows are not read before.
    """

    def __init__(self, spec: ComponentSpec, engine: Engine, eager: Callable[[], Engine], *, reason: str = "") -> None:
        self._spec = spec
        self._engine: Engine | None = engine  # until it is quarantined
        self._make_eager = eager
        self._eager: Engine | None = None
        self._use = EngineUse(spec.component, engine.backend, reason)

    @property
    def use(self) -> EngineUse:
        """The engine in use, and why it is not the one asked for."""
        return self._use

    @property
    def compiled(self) -> bool:
        """Whether there is still something to fall back from."""
        return self._engine is not None and self._engine.backend is not Backend.EAGER

    def run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, EngineUse]:
        """The component's output, and the engine that made it.

        Raises:
            RuntimeError: eager failed too.
            torch.OutOfMemoryError: there was no memory for this call, or for eager's weights.
            CheckpointError, OSError: eager's weights cannot be read.
        """
        if self._engine is None:
            return self._fallback().run(inputs), self._use
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        if not self._engine.fits(shapes):
            eager = self._fallback()
            # Does not name the shapes: reasons label a metric, and clients choose sizes.
            reason = f"the {self._engine.backend} engine was not built for such a size, prompt or batch"
            return eager.run(inputs), EngineUse(self._spec.component, eager.backend, reason)
        try:
            return self._engine.run(inputs), self._use
        except EngineRunError as error:
            if not self.compiled:
                raise
            self.quarantine(str(error))
        return self._fallback().run(inputs), self._use

    def by_eager(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Eager's output for `inputs`, whichever engine is in use; raises like `run`."""
        return self._fallback().run(inputs)

    def quarantine(self, reason: str) -> None:
        """Replaces a compiled engine with eager, for good; eager's weights are read when they are needed."""
        assert self._engine is not None, "it is quarantined once"
        log.error("%s: the %s engine is quarantined: %s", self._spec.component, self._engine.backend, reason)
        failed, self._engine = self._engine, None
        self._use = EngineUse(self._spec.component, Backend.EAGER, reason)
        failed.close()  # before eager is made: both may not fit into memory

    def free_memory(self) -> None:
        """Has the engines free memory that they can do without."""
        for engine in self._engines():
            if isinstance(engine, KeepsMemory):
                engine.free_memory()

    def keep_kernels(self) -> None:
        """Has the engines keep for the next start what they have compiled."""
        for engine in self._engines():
            if isinstance(engine, KeepsKernels):
                engine.keep_kernels()

    def _fallback(self) -> Engine:
        if self._eager is None:
            self._eager = self._make_eager()
        return self._eager

    def close(self) -> None:
        """Frees the memory of both engines."""
        for engine in self._engines():
            engine.close()

    def _engines(self) -> list[Engine]:
        """The engines that exist now."""
        return [engine for engine in (self._engine, self._eager) if engine is not None]
