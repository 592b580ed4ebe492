"""What the two flavours of TensorRT do differently when a plan is run, and how its calls are recorded."""

import logging
import os
from contextlib import suppress
from pathlib import Path

import torch

from export.errors import PlanError
from export.manifest import Backend
from export.plans import Foreign, OpenPlan
from export.spec import ComponentSpec
from server.engines.recorded import CudaRecorder, Graph

log = logging.getLogger(__name__)


class TensorRtPlan(OpenPlan):
    """An open plan whose contexts compute in memory lent to them."""

    def __init__(self, trt: Foreign, path: Path, spec: ComponentSpec, backend: Backend, recorder: CudaRecorder) -> None:
        super().__init__(trt, path, spec)
        self._trt, self._recorder = trt, recorder
        self._compiled = CompiledKernels(trt, self.engine, path) if backend is Backend.TENSORRT_RTX else None

    def context_in(self, profile: int) -> Foreign:
        """A new context in `profile`, without memory to compute in."""
        if self._compiled is None:
            context = self.context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            context = self.context(self._compiled.config(profile))
        self.select(context, profile)
        return context

    def record(self, context: Foreign) -> Graph | None:
        """One call as a CUDA graph; None if it cannot be recorded."""
        if self._compiled is not None and not context.is_stream_capturable(self._recorder.stream().cuda_stream):
            return None
        try:
            graph, _ = self._recorder(lambda: self.execute(context), None)
        except (PlanError, RuntimeError) as error:
            log.warning("calls of this shape are not recorded as a CUDA graph: %s", error)
            return None
        return graph

    def keep_compiled(self) -> None:
        """Writes the kernels compiled so far beside the plan, for the next start."""
        if self._compiled is not None:
            self._compiled.keep()

    def close(self) -> None:
        """Frees the weights' memory; no context may be left."""
        self.keep_compiled()
        self._compiled = None
        del self.engine, self._runtime


class CompiledKernels:
    """TensorRT-RTX compiles kernels when it first meets a shape; what it has compiled is kept beside the plan."""

    def __init__(self, trt: Foreign, engine: Foreign, plan: Path) -> None:
        # Hidden: it is not part of the export, and a poll of the repository would take it for a new version.
        self._file = plan.with_name(f".{plan.stem}.runtime_cache")
        self._kept = b""
        fixed, ranged = engine.create_runtime_config(), engine.create_runtime_config()
        strategy = trt.DynamicShapesKernelSpecializationStrategy
        # The default size is worth waiting for in warm-up; other shapes start at once on general kernels.
        fixed.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
        ranged.dynamic_shapes_kernel_specialization_strategy = strategy.LAZY
        self._cache = fixed.create_runtime_cache()
        with suppress(OSError):  # there is none yet, or it belongs to another user
            self._kept = self._file.read_bytes()
        if self._kept and not self._cache.deserialize(self._kept):
            log.info("%s is of another GPU, driver or TensorRT-RTX; kernels are compiled anew", self._file)
        self._configs = (fixed, ranged)  # they and the cache have to live as long as their contexts
        for config in self._configs:
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if not config.set_runtime_cache(self._cache):
                log.warning("TensorRT-RTX takes no runtime cache, and compiles its kernels at every start")

    def config(self, profile: int) -> Foreign:
        """The configuration for contexts in `profile`."""
        return self._configs[min(profile, 1)]

    def keep(self) -> None:
        """Writes the kernels for the next start, which compiles them again if that fails."""
        draft = self._file.with_suffix(f".{os.getpid()}.draft")  # a model's workers share the folder
        with suppress(OSError, RuntimeError):  # a read-only model repository, or a device in error
            torch.cuda.synchronize()
            compiled = bytes(self._cache.serialize())
            if compiled != self._kept:
                draft.write_bytes(compiled)
                draft.replace(self._file)
                self._kept = compiled
