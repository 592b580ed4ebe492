"""PyTorch itself: always available, the slowest, and the reference for every other engine."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from export.manifest import Backend
from export.modules import load_components
from export.spec import Component, Precision
from server.engines import memory
from server.engines.base import Shapes
from server.engines.threads import torch_threads


class EagerEngine:
    """Runs the component's module as it is, on a CPU with `threads` threads."""

    backend = Backend.EAGER

    def __init__(self, module: nn.Module, threads: int | None = None) -> None:
        self._module: nn.Module | None = module
        self._threads = threads

    def fits(self, shapes: Shapes) -> bool:
        return True

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        assert self._module is not None, "the engine is closed"
        try:
            with torch.inference_mode(), torch_threads(self._threads):
                output: Tensor = self._module(**inputs)
        except RuntimeError as error:
            if memory.host_refused(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        return output

    def close(self) -> None:
        self._module = None


class EagerModules:
    """The checkpoint's modules, read when first needed.

    A backend that keeps its own weights never causes a read; one that borrows them (AOTInductor) and the eager
    fallback share one copy.
    """

    def __init__(self, checkpoint: Path, precision: Precision, device: str) -> None:
        self._checkpoint, self._precision = checkpoint, precision
        self.device = torch.device(device)
        self._modules: dict[Component, nn.Module] = {}

    def load(self, components: Collection[Component]) -> None:
        """Reads all of `components` in one go, so that what they share is in memory once."""
        missing = [c for c in components if c not in self._modules]
        if missing:
            self._modules |= load_components(
                self._checkpoint, precision=self._precision, device=str(self.device), wanted=missing
            )

    def __getitem__(self, component: Component) -> nn.Module:
        self.load([component])
        return self._modules[component]
