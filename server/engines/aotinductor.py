"""AOTInductor: compiled code that uses the eager module's own weights, on the CPU or on CUDA."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from export.manifest import Backend
from export.packages import open_package
from export.spec import ComponentSpec
from server.engines import memory
from server.engines.base import Shapes
from server.engines.limits import ShapeLimits
from server.engines.threads import torch_threads
from server.errors import EngineLoadError, EngineRunError


class AotInductorEngine:
    """A package with its weights lent by `module`: changing one in place changes both. On a CPU, `threads` compute."""

    backend = Backend.AOTINDUCTOR

    def __init__(self, path: Path, spec: ComponentSpec, limits: ShapeLimits, module: nn.Module, threads: int) -> None:
        try:
            self._package = open_package(path, module)
        except (RuntimeError, KeyError) as error:
            raise EngineLoadError(f"AOTInductor cannot load {path}: {error}") from error
        self._names = [t.name for t in spec.inputs]
        self._limits, self._threads = limits, threads
        self._refusals = memory.refusals()

    def fits(self, shapes: Shapes) -> bool:
        return self._limits.fit(shapes)

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        try:
            with torch.inference_mode(), torch_threads(self._threads):
                output: Tensor = self._package(*(inputs[name] for name in self._names))
        except RuntimeError as error:
            # The package's C interface makes one kind of error of all; the allocator still knows what it refused.
            if (refused := memory.refusals()) > self._refusals:
                self._refusals = refused
                raise torch.OutOfMemoryError(str(error)) from error
            raise EngineRunError(f"AOTInductor failed: {error}") from error
        return output

    def close(self) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # calls that were begun may still be running
        del self._package
