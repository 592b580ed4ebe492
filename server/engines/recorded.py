"""CUDA calls recorded as graphs and replayed, so that the host launches one graph instead of every kernel.

The first call of a shape runs plainly, because libraries prepare themselves in it, which they could not do while being
recorded. The second is recorded, and from then on inputs are copied to the buffers that the graph reads, and its result
from the one that it writes. All calls share these buffers, so they must be ordered: on one stream, or by waiting.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Enough for four warm-up sizes of 16 denoiser shapes each (batches of 1 to 8 rows, four captions).
MOST = 64

T = TypeVar("T")


class Graph(Protocol):
    """The interface of a CUDA graph."""

    def replay(self) -> None:
        """Puts the recorded call on the current stream."""

    def pool(self) -> Any:
        """The handle of the memory pool that it computes in."""


class Recorder(Protocol):
    """Records `work` without running it, in the memory of `beside`; returns the graph and the tensor it will write."""

    def __call__(self, work: Callable[[], Tensor], beside: Graph | None) -> tuple[Graph, Tensor]:
        """Raises: RuntimeError, including torch.OutOfMemoryError; the device can be used as before."""


class CudaRecorder:
    """Records CUDA graphs, on streams of its own.

    Any thread may free pinned memory that a stream has copied to, and torch then records an event on that stream to
    know when the copy is done. On a stream that is being recorded, the event would be part of the graph, and querying
    it an error.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[int, torch.cuda.Stream] = {}  # by priority

    def __call__(self, work: Callable[[], T], beside: Graph | None) -> tuple[Graph, T]:
        """See `Recorder`. It waits for the device."""
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if beside is None else beside.pool()
        stream = self.stream()
        with torch.cuda.stream(stream):  # torch itself does not restore the caller's stream after every error
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    output = work()
            except RuntimeError:
                self._end(pool)
                raise
        return graph, output

    def stream(self) -> torch.cuda.Stream:
        """The stream to record on now, with the current stream's priority, which kernels keep in the graph."""
        priority = torch.cuda.current_stream(self._device).priority
        if priority not in self._streams:
            self._streams[priority] = torch.cuda.Stream(self._device, priority=priority)  # type: ignore[no-untyped-call]
        return self._streams[priority]

    @staticmethod
    def _end(pool: Any) -> None:
        """Ends the recording for torch's allocator, which older versions leave open when CUDA's own end fails.

        Until then `torch.cuda.empty_cache` fails (pytorch issue 180395, torch 2.11 and 2.12).
        """
        with suppress(RuntimeError):  # it has ended already
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


@dataclass(frozen=True, eq=False)
class Recording:
    """One shape's call, and the buffers that it reads and writes."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    graph: Graph

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The call's output for `inputs`."""
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next call overwrites it


class Plainly(Enum):
    """Why a shape's call is not replayed."""

    NEW = auto()
    MET_ONCE = auto()
    NOT_RECORDABLE = auto()


_Shapes = tuple[tuple[int, ...], ...]


class RecordedCalls:
    """`call`, replayed for the `most` recently used shapes.

    A shape that cannot be recorded runs plainly, so recording never makes a call fail.
    """

    def __init__(self, call: Callable[..., Tensor], record: Recorder, most: int = MOST) -> None:
        self._call, self._record, self._most = call, record, most
        self._known: dict[_Shapes, Recording | Plainly] = {}  # the most recently used last
        self._overflowed = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What `call` returns; inputs are positional, on the device."""
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        known = self._known.pop(shapes, Plainly.NEW)
        if known is Plainly.MET_ONCE:
            known = self._try_to_record(inputs)
        self._remember(shapes, Plainly.MET_ONCE if known is Plainly.NEW else known)
        return known.replay(inputs) if isinstance(known, Recording) else self._call(*inputs)

    def stop(self) -> None:
        """Frees the recordings' memory and makes no more of them; the device must not be running one.

        After memory has run out, new recordings could take memory that plain calls need.
        """
        if self._most:
            log.warning("memory has run out: calls are not recorded as CUDA graphs any more")
        self._most = 0
        self._known.clear()

    def _try_to_record(self, inputs: tuple[Tensor, ...]) -> Recording | Plainly:
        beside = next((known.graph for known in self._known.values() if isinstance(known, Recording)), None)
        try:
            held = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)
            graph, output = self._record(lambda: self._call(*held), beside)
        except RuntimeError as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
            log.warning("calls with inputs of shape %s are not recorded as a CUDA graph: %s", shapes, error)
            return Plainly.NOT_RECORDABLE
        return Recording(held, output, graph)

    def _remember(self, shapes: _Shapes, known: Recording | Plainly) -> None:
        self._known[shapes] = known
        while len(self._known) > self._most:
            self._forget(next(iter(self._known)))

    def _forget(self, shapes: _Shapes) -> None:
        if isinstance(self._known.pop(shapes), Recording) and not self._overflowed:
            self._overflowed = True
            log.warning(
                "over %d shapes are in use, so CUDA graphs are freed and recorded anew; fewer warmup_sizes help",
                self._most,
            )
