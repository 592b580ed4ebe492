"""Calls on CUDA, recorded as graphs and replayed: the host launches one thing then, instead of every kernel.

The first call of a shape runs plainly, for libraries prepare themselves in it as they could not while one records. The
second is recorded, and from then on inputs are copied to where the graph reads, and its result from where it writes.
As these places are the same in every call, calls have to be in order: on one stream, or after one has waited.
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

# Warm-up meets 16 shapes of the denoiser a size (batches of 1 to 8 rows, four captions), which have to stay.
MOST = 64


T = TypeVar("T")


class Graph(Protocol):
    """As a CUDA graph is."""

    def replay(self) -> None:
        """Puts the recorded call on the current stream."""

    def pool(self) -> Any:
        """Names the memory it computes in."""


class Recorder(Protocol):
    """Records what `work` does, without doing it, in the memory of `beside`: the graph, and what it will write to."""

    def __call__(self, work: Callable[[], Tensor], beside: Graph | None) -> tuple[Graph, Tensor]:
        """Raises: RuntimeError, torch.OutOfMemoryError among them; the device can be used as before."""


class CudaRecorder:
    """Records CUDA graphs, on streams of its own.

    Any thread may free pinned memory that was copied to on a stream, and torch then marks that stream to know when the
    copy is done: on a stream that is being recorded, the mark would be part of the graph, and asking for it an error.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[int, torch.cuda.Stream] = {}  # by priority

    def __call__(self, work: Callable[[], T], beside: Graph | None) -> tuple[Graph, T]:
        """See `Recorder`. It waits for the device."""
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if beside is None else beside.pool()
        stream = self.stream()
        with torch.cuda.stream(stream):  # torch's own way back to the caller's stream is not reached by all errors
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    output = work()
            except RuntimeError:
                self._end(pool)
                raise
        return graph, output

    def stream(self) -> torch.cuda.Stream:
        """The one to record on now: of the current one's priority, which kernels keep in the graph."""
        priority = torch.cuda.current_stream(self._device).priority
        if priority not in self._streams:
            self._streams[priority] = torch.cuda.Stream(self._device, priority=priority)  # type: ignore[no-untyped-call]
        return self._streams[priority]

    @staticmethod
    def _end(pool: Any) -> None:
        """Ends the recording for torch's allocator, which older versions do not when CUDA's own end of it fails.

        While it believes in one, `torch.cuda.empty_cache` fails (pytorch issue 180395, torch 2.11 and 2.12).
        """
        with suppress(RuntimeError):  # it has ended
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


@dataclass(frozen=True, eq=False)
class Recording:
    """One shape's call, and the places where it reads and writes."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    graph: Graph

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """What the call makes of `inputs`."""
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next call writes over it


class Plainly(Enum):
    """Why a shape's call is not replayed."""

    NEW = auto()
    MET_ONCE = auto()
    NOT_RECORDABLE = auto()


_Shapes = tuple[tuple[int, ...], ...]


class RecordedCalls:
    """`call`, replayed for the `most` shapes that were used last.

    A shape that cannot be recorded runs plainly, so recording is never the reason why a call fails.
    """

    def __init__(self, call: Callable[..., Tensor], record: Recorder, most: int = MOST) -> None:
        self._call, self._record, self._most = call, record, most
        self._known: dict[_Shapes, Recording | Plainly] = {}  # what was used last is at the end

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What `call` returns; inputs are positional, on the device."""
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        known = self._known.pop(shapes, Plainly.NEW)
        if known is Plainly.MET_ONCE:
            known = self._try_to_record(inputs)
        self._remember(shapes, Plainly.MET_ONCE if known is Plainly.NEW else known)
        return known.replay(inputs) if isinstance(known, Recording) else self._call(*inputs)

    def stop(self) -> None:
        """Gives the recordings' memory back and makes no more; the device must not be busy with one.

        Where memory has run out, recordings that are made again could take from plain calls what these need.
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
            del self._known[next(iter(self._known))]
