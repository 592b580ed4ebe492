"""What an engine is."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from export.manifest import Backend

Shapes = Mapping[str, tuple[int, ...]]


class Engine(Protocol):
    """Tensors in, one tensor out, on the caller's device and stream."""

    backend: Backend

    def fits(self, shapes: Shapes) -> bool:
        """Whether inputs of these shapes, by name, can be run."""

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Runs the component once.

        Raises:
            EngineRunError: the engine failed; it must not be used again.
            torch.OutOfMemoryError: there was no memory for this call; smaller ones may succeed.
        """

    def close(self) -> None:
        """Waits for calls that the device is still running, and frees the memory."""


@runtime_checkable
class KeepsMemory(Protocol):
    """What an engine also implements if it keeps memory on the device that it can do without."""

    def free_memory(self) -> None:
        """Frees that memory, because there is too little; calls may be slower from then on."""


@runtime_checkable
class KeepsKernels(Protocol):
    """What an engine also implements if it compiles kernels while it runs, which the next start need not."""

    def keep_kernels(self) -> None:
        """Writes those compiled so far, if it can."""
