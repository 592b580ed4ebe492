"""Opens TensorRT plans, for the export's check and the server's engine.

TensorRT-RTX has TensorRT's Python API under another name, so one code serves both flavours; of what it has besides,
`context_configs` uses what decides how kernels are chosen. Nothing here touches a GPU until a plan is opened.
"""

import importlib
import logging
import mmap
import re
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.errors import BuildError, PlanError, UnsupportedError
from export.manifest import Backend
from export.spec import ComponentSpec, DType, TensorSpec

Foreign = Any  # TensorRT's own objects, whose bindings carry no types

INSTALL = {
    "tensorrt": "pip install tensorrt (see https://docs.nvidia.com/deeplearning/tensorrt)",
    "tensorrt_rtx": "pip install 'zserve[tensorrt-rtx]'",
}
MOST_ERRORS = 8  # kept per operation
SMALLEST_SCRATCH = 256  # bytes; a context takes no empty buffer

_DTYPES = {DType.FLOAT32: "FLOAT", DType.INT64: "INT64", DType.UINT8: "UINT8"}
_TORCH_DTYPES = {DType.FLOAT32: torch.float32, DType.INT64: torch.int64, DType.UINT8: torch.uint8}

_NO_MEMORY = re.compile("out ?of ?memory|could not be allocated", re.IGNORECASE)

log = logging.getLogger(__name__)


def import_flavour(library: str) -> Foreign:
    """`tensorrt` or `tensorrt_rtx`.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise UnsupportedError(f"{library} cannot be imported ({error}); install it: {INSTALL[library]}") from error


@cache
def logger(trt: Foreign) -> Foreign:
    """The one logger that TensorRT takes for a process; it keeps the last errors, for messages."""
    severity = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=MOST_ERRORS)

        def log(self, level: Foreign, text: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(text)
                log.warning("TensorRT: %s", text)  # logged too, as not every error makes a call fail
            elif level == severity.WARNING:
                if _NO_MEMORY.search(text):
                    self.errors.append(text)
                log.info("TensorRT: %s", text)

        def forget(self) -> None:
            """Drops the errors so far, so that they do not explain a later failure."""
            self.errors.clear()

        def said(self) -> str:
            """The errors since the last `forget`."""
            return "; ".join(self.errors) or "it gave no reason"

    return Log()


def failure(what: str, said: str, kind: type[BuildError] = PlanError) -> Exception:
    """The error of a call that failed: TensorRT allocates beside torch, and only its words tell a want of memory."""
    return (torch.OutOfMemoryError if _NO_MEMORY.search(said) else kind)(f"{what}: {said}")


def described(trt: Foreign, tensor: TensorSpec) -> tuple[str, Foreign, tuple[int, ...]]:
    """Name, TensorRT's type and shape (-1 where it is dynamic) of `tensor`, as a network or a plan has to have it."""
    return tensor.name, getattr(trt.DataType, _DTYPES[tensor.dtype]), tensor.served_shape()


def context_configs(trt: Foreign, engine: Foreign, backend: Backend) -> tuple[Foreign, Foreign]:
    """What contexts in the first profile and in the others are made with; both leave their memory to the caller."""
    user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if backend is Backend.TENSORRT:
        return user_managed, user_managed
    fixed, ranged = engine.create_runtime_config(), engine.create_runtime_config()
    # The default size is worth waiting for; other shapes start at once on general kernels.
    strategy = trt.DynamicShapesKernelSpecializationStrategy
    fixed.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
    ranged.dynamic_shapes_kernel_specialization_strategy = strategy.LAZY
    for config in (fixed, ranged):
        config.set_execution_context_allocation_strategy(user_managed)
    return fixed, ranged


class OpenPlan:
    """The plan at `path` on the current CUDA device, with its weights in.

    Raises:
        PlanError: it is damaged or foreign, it is not of this component, or the weights beside it do not fit.
        torch.OutOfMemoryError: there is no memory for it.
    """

    def __init__(self, trt: Foreign, path: Path, spec: ComponentSpec, backend: Backend) -> None:
        self.log = logger(trt)
        self.log.forget()
        free = torch.cuda.mem_get_info()[0]
        self._runtime = trt.Runtime(self.log)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise self._failure(f"TensorRT cannot load {path} ({_room(path, free)})")
        if self.engine.refittable:  # only plans without weights are
            self._refit(trt, path.with_suffix(".onnx"))
        self._check_tensors(trt, path, spec)
        self.configs = context_configs(trt, self.engine, backend)

    def _refit(self, trt: Foreign, graph: Path) -> None:
        refitter = trt.Refitter(self.engine, self.log)
        parser = trt.OnnxParserRefitter(refitter, self.log)
        if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            raise self._failure(f"the weights beside {graph} do not fit its plan")

    def _check_tensors(self, trt: Foreign, path: Path, spec: ComponentSpec) -> None:
        """The names, types and shapes that the plan has must be those of the spec, in whatever order."""
        engine = self.engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        has = {(n, engine.get_tensor_dtype(n), tuple(engine.get_tensor_shape(n))) for n in names}
        wanted = {described(trt, tensor) for tensor in (*spec.inputs, spec.output)}
        if has != wanted:
            raise PlanError(f"{path} has tensors {has}; {spec.component} needs {wanted}: export the model again")

    def context_in(self, profile: int) -> Foreign:
        """A new execution context in `profile`, without memory to compute in.

        Raises:
            PlanError: TensorRT cannot make one.
            torch.OutOfMemoryError: for want of memory.
        """
        self.log.forget()
        context = self.engine.create_execution_context(self.configs[min(profile, 1)])
        if context is None:
            raise self._failure("TensorRT cannot make an execution context")
        stream = torch.cuda.current_stream()
        if not context.set_optimization_profile_async(profile, stream.cuda_stream):
            raise self._failure(f"TensorRT refuses profile {profile}")
        stream.synchronize()
        return context

    def bind(self, context: Foreign, spec: ComponentSpec, inputs: Mapping[str, Tensor]) -> Tensor:
        """Tells `context` its inputs' shapes and addresses, and those of a new output, which is returned.

        Raises:
            PlanError: a shape is outside the profile that the context is in, or TensorRT does not take a buffer.
        """
        self.log.forget()
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise self._failure(f"TensorRT refuses {name} of shape {tuple(tensor.shape)}")
        shape = tuple(context.get_tensor_shape(spec.output.name))
        if min(shape) < 0:
            raise self._failure(f"TensorRT does not know the shape of {spec.output.name}, and has {shape}")
        device = next(iter(inputs.values())).device
        output = torch.empty(shape, dtype=_TORCH_DTYPES[spec.output.dtype], device=device)
        for name, tensor in {**inputs, spec.output.name: output}.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise self._failure(f"TensorRT does not take the buffer of {name}")
        return output

    def memory_needed(self, context: Foreign) -> int:
        """Bytes that `context` computes in with the shapes that it has been told.

        Raises:
            PlanError: TensorRT cannot tell, which a 0 means too.
        """
        return self._told(context.update_device_memory_size_for_shapes, "a call")

    def most_memory_needed(self, profile: int) -> int:
        """Bytes that suffice for every shape of the profile; raises like `memory_needed`."""
        return self._told(partial(self.engine.get_device_memory_size_for_profile_v2, profile), f"profile {profile}")

    def _told(self, ask: Callable[[], int], what: str) -> int:
        self.log.forget()
        needed = int(ask())
        if not needed and self.log.errors:
            raise self._failure(f"TensorRT cannot tell how much memory {what} needs")
        return needed or SMALLEST_SCRATCH

    def execute(self, context: Foreign) -> None:
        """Puts one call on the current stream.

        Raises:
            PlanError: TensorRT refused it.
            torch.OutOfMemoryError: for want of memory.
        """
        self.log.forget()
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise self._failure("TensorRT failed")

    def _failure(self, what: str) -> Exception:
        return failure(what, self.log.said())


def _room(path: Path, free: int) -> str:
    """What a plan and the weights beside it take, and what there was for them.

    For the message alone: GPUs that share the host's memory count the system's file cache as taken, so a plan may fit
    where less is free.
    """
    size = sum(file.stat().st_size for file in (path, path.with_suffix(".safetensors")) if file.exists())
    return f"{size >> 20} MiB; {free >> 20} MiB of device memory were free"
