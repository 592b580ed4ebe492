"""What the two flavours of TensorRT do differently when a plan is run, and how its calls are recorded."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from export.errors import PlanError
from export.manifest import Backend
from export.plans import Foreign, OpenPlan
from export.spec import ComponentSpec
from server.engines.recorded import CudaRecorder, Graph

log = logging.getLogger(__name__)


class TensorRtPlan(OpenPlan):
    """An open plan whose calls can be recorded."""

    def __init__(self, trt: Foreign, path: Path, spec: ComponentSpec, backend: Backend, recorder: CudaRecorder) -> None:
        super().__init__(trt, path, spec, backend)
        self._recorder = recorder
        self._compiled = CompiledKernels(self.configs, path) if backend is Backend.TENSORRT_RTX else None

    def record(self, context: Foreign) -> Graph:
        """One call as a CUDA graph.

        Raises:
            PlanError, RuntimeError: it cannot be recorded.
        """
        if self._compiled is not None and not context.is_stream_capturable(self._recorder.stream().cuda_stream):
            raise PlanError("TensorRT-RTX says that it cannot be captured")
        graph, _ = self._recorder(lambda: self.execute(context), None)
        return graph

    def keep_kernels(self) -> None:
        """Writes the kernels compiled so far beside the plan, for the next start."""
        if self._compiled is not None:
            self._compiled.keep()

    def close(self) -> None:
        """Frees the weights' memory; no context may be left."""
        self._compiled = None
        del self.configs, self.engine, self._runtime


class CompiledKernels:
    """TensorRT-RTX compiles kernels when it first meets a shape; what it has compiled is kept beside the plan."""

    def __init__(self, configs: Sequence[Foreign], plan: Path) -> None:
        # Hidden: it is not part of the export, and a poll of the repository would take it for a new version.
        self._file = plan.with_name(f".{plan.stem}.runtime_cache")
        self._kept = b""
        self._cache = configs[0].create_runtime_cache()  # has to live as long as the contexts
        with suppress(OSError):  # there is none yet, or it belongs to another user
            self._kept = self._file.read_bytes()
        if self._kept and not self._cache.deserialize(self._kept):
            log.info("%s is of another GPU, driver or TensorRT-RTX; kernels are compiled anew", self._file)
        for config in configs:
            if not config.set_runtime_cache(self._cache):
                log.warning("TensorRT-RTX takes no runtime cache, and compiles its kernels at every start")

    def keep(self) -> None:
        """Writes the kernels for the next start, which compiles them again if that fails."""
        draft = self._file.with_suffix(f".{os.getpid()}.draft")  # a model's workers share the folder
        with suppress(OSError, RuntimeError):  # a read-only model repository, or a device in error
            compiled = bytes(self._cache.serialize())
            if compiled != self._kept:
                draft.write_bytes(compiled)
                draft.replace(self._file)
                self._kept = compiled
