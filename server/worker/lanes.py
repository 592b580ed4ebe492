"""Where work runs on the device: each kind on a lane of its own, so that a decode does not hold up others' steps.

On CUDA a lane is a stream: one thread puts work on several of them and looks from time to time what is done. On a CPU
there is nothing to run beside, and a lane does its work at once.

Two rules make streams safe here, without torch's `record_stream`. All calls of one component are on one lane, so what
an engine keeps between calls (static buffers, graphs, scratch memory) is used in order. And memory changes lanes only
while the device does nothing with it: what one lane has made is used by another only once the host has seen it done,
and the inputs of pending work are kept until then, also when nobody wants its result any more.
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
    """Work that the device has been given. With no marks it is done."""

    def __init__(self, finish: Finish[T], *marks: Mark) -> None:
        self._finish, self.marks = finish, marks
        self._results: list[T] = []

    def done(self) -> bool:
        """Whether `result` would not have to wait."""
        return all(mark.query() for mark in self.marks)

    def result(self) -> T:
        """Waits for the device; the same every time."""
        if not self._results:
            for mark in self.marks:
                mark.synchronize()
            self._results.append(self._finish())
        return self._results[0]


class Lane:
    """A lane of a device that does everything at once."""

    def start(self, work: Callable[[], Finish[T]]) -> Pending[T]:
        """Puts `work` on the lane; what it returns makes the result, and holds the inputs until then."""
        return Pending(work())


class CudaLane(Lane):
    """A stream. Lanes with a lower `priority` number go first where the device cannot do both."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]

    def start(self, work: Callable[[], Finish[T]]) -> Pending[T]:
        """See `Lane`. After what the current stream has been given, where inputs come from."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            finish = work()
            mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
            mark.record(self._stream)
        return Pending(finish, mark)


def lanes(device: torch.device) -> Mapping[Component, Lane]:
    """One a component; the denoiser's goes first."""
    if device.type != "cuda":
        return dict.fromkeys(Component, Lane())
    return {c: CudaLane(device, priority=-1 if c is Component.DENOISER else 0) for c in Component}


def together(pending: Sequence[Pending[T]], finish: Callable[[list[T]], None]) -> Pending[None]:
    """Done when all of `pending` are; then `finish` gets their results."""
    return Pending(lambda: finish([p.result() for p in pending]), *(mark for p in pending for mark in p.marks))
