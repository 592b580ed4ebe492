"""TensorRT, of both flavours, on CUDA.

TensorRT reads and writes torch's buffers and computes in memory that torch lends it, on a stream of its own: on the
default stream it would synchronise the device at every call, and could not be recorded. The shapes of the first
profile, one image at the default size, are replayed as CUDA graphs; other shapes run plainly.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from export.errors import PlanError, UnsupportedError
from export.manifest import EngineRecord
from export.plans import Foreign, import_flavour
from export.spec import ComponentSpec
from export.validity import BINDING_LIBRARIES
from server.engines import memory
from server.engines.base import Shapes
from server.engines.recorded import CudaRecorder, Graph
from server.engines.tensorrt_runtime import TensorRtPlan
from server.errors import EngineLoadError, EngineRunError

RECORDED_PROFILE = 0

log = logging.getLogger(__name__)


class TensorRtEngine:
    """One plan on one device; `record.plan` says which shapes it takes."""

    def __init__(self, path: Path, spec: ComponentSpec, record: EngineRecord, device: torch.device) -> None:
        if record.plan is None:
            raise EngineLoadError(f"the manifest tells no profiles of {path}; export the model again")
        if not torch.cuda.is_available():
            raise EngineLoadError(f"{record.backend} needs an NVIDIA GPU, and there is none here")
        self.backend = record.backend
        self._profiles = record.plan.profiles
        self._spec = spec
        self._device = device
        (library,) = BINDING_LIBRARIES[record.backend]
        with torch.cuda.device(device):
            try:
                before = torch.cuda.mem_get_info()[0]
                self._plan = TensorRtPlan(import_flavour(library), path, spec, record.backend, CudaRecorder(device))
                self._held = max(0, before - torch.cuda.mem_get_info()[0])
            except torch.OutOfMemoryError:
                raise
            except (PlanError, UnsupportedError, OSError, RuntimeError) as error:
                raise EngineLoadError(f"TensorRT cannot open {path}: {error}") from error
        memory.add_outside_torch(self._held)
        self._streams: dict[int, torch.cuda.Stream] = {}  # by priority
        self._scratch = Scratch(self._plan, device)
        self._plain: dict[int, Foreign] = {}  # one context per profile
        self._recorded: dict[tuple[tuple[int, ...], ...], RecordedCall] = {}
        self._recorded_in: Tensor | None = None  # the memory that all of them compute in, once there is one

    def fits(self, shapes: Shapes) -> bool:
        return self._profile(shapes) is not None

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        profile = self._profile({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        if profile is None:
            raise EngineRunError(f"TensorRT: no profile of {self._spec.component} takes these shapes")
        caller = torch.cuda.current_stream(self._device)
        stream = self._stream(caller.priority)
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream), torch.inference_mode():
                output = self._call(inputs) if profile == RECORDED_PROFILE else self._run_plain(profile, inputs)
        except torch.OutOfMemoryError:
            raise
        except (PlanError, RuntimeError) as error:  # torch's own too, such as a failed copy's
            raise EngineRunError(f"TensorRT failed: {error}") from error
        caller.wait_stream(stream)
        output.record_stream(caller)  # otherwise its memory could be reused while the caller still reads it
        return output

    def _stream(self, priority: int) -> torch.cuda.Stream:
        """The engine's own stream of the caller's priority, which its kernels inherit: the denoiser's go first."""
        if priority not in self._streams:
            self._streams[priority] = torch.cuda.Stream(self._device, priority=priority)  # type: ignore[no-untyped-call]
        return self._streams[priority]

    def free_memory(self) -> None:
        """See `KeepsMemory`: frees contexts, graphs and scratch memory, which are made again when needed."""
        with suppress(RuntimeError):  # a device in error: there is nothing to wait for
            for stream in self._streams.values():
                stream.synchronize()
        self._recorded.clear()
        self._recorded_in = None
        self._plain.clear()
        self._scratch.free()

    def keep_kernels(self) -> None:
        """See `KeepsKernels`: TensorRT-RTX compiles for the GPU that it finds, and for the shapes that it meets."""
        self._plan.keep_kernels()

    def close(self) -> None:
        self.free_memory()
        self._plan.close()
        memory.add_outside_torch(-self._held)
        self._held = 0

    def _profile(self, shapes: Shapes) -> int | None:
        fitting = (i for i, profile in enumerate(self._profiles) if profile.takes(self._spec, shapes))
        return next(fitting, None)

    def _run_plain(self, profile: int, inputs: Mapping[str, Tensor]) -> Tensor:
        if profile not in self._plain:
            self._plain[profile] = self._plan.context_in(profile)
        context = self._plain[profile]
        held = {name: tensor.contiguous() for name, tensor in inputs.items()}  # until the call is on the stream
        output = self._plan.bind(context, self._spec, held)
        self._scratch.lend(context)
        self._plan.execute(context)
        return output

    def _call(self, inputs: Mapping[str, Tensor]) -> Tensor:
        key = tuple(tuple(tensor.shape) for tensor in inputs.values())
        if key not in self._recorded:
            self._recorded[key] = RecordedCall(self._plan, self._memory_of_recorded(), self._spec, inputs)
        return self._recorded[key](inputs)

    def _memory_of_recorded(self) -> Tensor:
        """For the profile's largest call from the start: if it moved, everything would have to be recorded again."""
        if self._recorded_in is None:
            self._recorded_in = _bytes(self._plan.most_memory_needed(RECORDED_PROFILE), self._device)
        return self._recorded_in


class RecordedCall:
    """Calls of one shape: the first runs plainly and is recorded, all others are replayed if that succeeds.

    It has a context to itself, because a context may not change once a graph is recorded from it, and computes in
    `scratch`, which has to suffice for the whole profile: recorded graphs go on using it.
    """

    def __init__(self, plan: TensorRtPlan, scratch: Tensor, spec: ComponentSpec, inputs: Mapping[str, Tensor]) -> None:
        self._plan, self._scratch, self._component = plan, scratch, spec.component
        self._context = plan.context_in(RECORDED_PROFILE)
        self._inputs = {name: torch.empty_like(t, memory_format=torch.contiguous_format) for name, t in inputs.items()}
        self._output = plan.bind(self._context, spec, self._inputs)
        self._context.set_device_memory(scratch.data_ptr(), scratch.numel())
        self._graph: Graph | None = None
        self._is_first = True

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._plan.execute(self._context)
            if self._is_first:  # not before: TensorRT's setup in a first run cannot be recorded
                self._record()
        self._is_first = False
        return self._output.clone()  # the next call overwrites it

    def _record(self) -> None:
        try:
            self._graph = self._plan.record(self._context)
        except (PlanError, RuntimeError) as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self._inputs.items())
            log.warning(
                "%s: calls with %s are not recorded as a CUDA graph, and start more slowly: %s",
                *(self._component, shapes, error),
            )


class Scratch:
    """The memory that plain calls of an engine compute in, one at a time; it grows to the largest call."""

    def __init__(self, plan: TensorRtPlan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._buffer = _bytes(0, device)

    def lend(self, context: Foreign) -> None:
        """Lends `context` the memory that its shapes need."""
        needed = self._plan.memory_needed(context)
        if needed > self._buffer.numel():
            self.free()  # first: both may not fit
            self._buffer = _bytes(needed, self._device)
        context.set_device_memory(self._buffer.data_ptr(), self._buffer.numel())

    def free(self) -> None:
        """Frees the memory until it is lent again."""
        self._buffer = _bytes(0, self._device)


def _bytes(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)
