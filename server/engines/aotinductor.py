"""AOTInductor: compiled code that uses the eager module's own weights, on the CPU or on CUDA.

On CUDA a shape's calls are recorded as a graph and replayed (see `recorded`).
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from export.manifest import Backend
from export.packages import open_package
from export.profiles import ShapeProfile
from export.spec import ComponentSpec
from server.engines import memory
from server.engines.base import Shapes
from server.engines.recorded import CudaRecorder, RecordedCalls
from server.engines.threads import torch_threads
from server.errors import EngineLoadError, EngineRunError


class AotInductorEngine:
    """A package that uses `module`'s weights: changing one in place changes both. On a CPU it has `threads` threads."""

    backend = Backend.AOTINDUCTOR

    def __init__(self, path: Path, spec: ComponentSpec, profile: ShapeProfile, module: nn.Module, threads: int) -> None:
        try:
            self._call: Callable[..., Tensor] = PackageCalls(open_package(path, module))
        except (RuntimeError, KeyError) as error:
            raise EngineLoadError(f"AOTInductor cannot load {path}: {error}") from error
        device = next(module.parameters()).device
        if device.type == "cuda":
            self._call = RecordedCalls(self._call, CudaRecorder(device))
        self._spec, self._profile, self._threads = spec, profile, threads

    def fits(self, shapes: Shapes) -> bool:
        return self._profile.takes(self._spec, shapes)

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        try:
            with torch.inference_mode(), torch_threads(self._threads):
                # A package reads its inputs as if they were laid out in order, whatever their strides say.
                return self._call(*(inputs[tensor.name].contiguous() for tensor in self._spec.inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise EngineRunError(f"AOTInductor failed: {error}") from error

    def free_memory(self) -> None:
        """See `KeepsMemory`: frees the graphs, and runs without them from then on."""
        if isinstance(self._call, RecordedCalls):
            _wait()
            self._call.stop()

    def close(self) -> None:
        _wait()
        del self._call


class PackageCalls:
    """A package whose errors distinguish refused memory from everything else."""

    def __init__(self, package: Callable[..., Tensor]) -> None:
        self._package = package

    def __call__(self, *inputs: Tensor) -> Tensor:
        refused = memory.refusals()
        try:
            return self._package(*inputs)
        except RuntimeError as error:
            # The package's C interface turns all errors into one kind; the allocator still counts what it refused.
            if memory.refusals() > refused or memory.host_refused(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise


def _wait() -> None:
    """Waits for calls that may still be running on the device."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with suppress(RuntimeError):  # a device in error: there is nothing to wait for
            torch.cuda.synchronize()
