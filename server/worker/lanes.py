"""Where work runs on the device: each kind on a lane of its own, so that a decode does not hold up others' steps.

On CUDA a lane is a stream: one thread puts work on several of them and polls for what is done. On a CPU nothing
runs concurrently, and a lane does its work at once.

Two rules make streams safe here, without torch's `record_stream`. All calls of one component are on one lane, so what
an engine keeps between calls (static buffers, graphs, scratch memory) is used in order. And memory changes lanes only
while the device is not using it: one lane's output is used by another only once the host has seen it complete, and the
inputs of pending work are kept until then, even if its result is no longer wanted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from export.spec import Component

T = TypeVar("T")
Finish = Callable[[], T]  # makes the result on the host, once the device is done


class Mark(Protocol):
    """A point on a lane, as a CUDA event is."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Waits until it has."""


class Pending(Generic[T]):
    """Work submitted to the device. Without marks it is already done."""

    def __init__(self, finish: Finish[T], *marks: Mark) -> None:
        self._finish, self.marks = finish, marks
        self._results: list[T] = []

    def done(self) -> bool:
        """Whether `result` would not have to wait."""
        return all(mark.query() for mark in self.marks)

    def result(self) -> T:
        """Waits for the device; returns the same object every time."""
        if not self._results:
            for mark in self.marks:
                mark.synchronize()
            self._results.append(self._finish())
        return self._results[0]


class Lane:
    """A lane of a device that runs its work synchronously."""

    def start(self, work: Callable[[], Finish[T]]) -> Pending[T]:
        """Starts `work` on the lane; the callable it returns makes the result, and holds the inputs until then."""
        return Pending(work())


class CudaLane(Lane):
    """A stream. Lanes with a lower `priority` number go first where the device cannot do both."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]

    def start(self, work: Callable[[], Finish[T]]) -> Pending[T]:
        """See `Lane`. Runs after the work already on the current stream, which made the inputs."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            finish = work()
            mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
            mark.record(self._stream)
        return Pending(finish, mark)


def lanes(device: torch.device) -> Mapping[Component, Lane]:
    """One lane per component; the denoiser's goes first."""
    if device.type != "cuda":
        return dict.fromkeys(Component, Lane())
    return {c: CudaLane(device, priority=-1 if c is Component.DENOISER else 0) for c in Component}


def together(pending: Sequence[Pending[T]], finish: Callable[[list[T]], None]) -> Pending[None]:
    """Done when all of `pending` are; then `finish` gets their results."""
    return Pending(lambda: finish([p.result() for p in pending]), *(mark for p in pending for mark in p.marks))
