"""ONNX Runtime, on the CPU."""

from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from export.manifest import Backend
from export.profiles import ShapeProfile
from export.spec import ComponentSpec
from server.engines import memory
from server.engines.base import Shapes
from server.errors import EngineLoadError, EngineRunError

# onnxruntime raises its own exceptions, which have no common base below Exception; these are the ones documented
# for loading and running.
_state = onnxruntime.capi.onnxruntime_pybind11_state
ORT_ERRORS = (
    _state.Fail,
    _state.InvalidArgument,
    _state.InvalidGraph,
    _state.InvalidProtobuf,
    _state.NoSuchFile,
    _state.NotImplemented,
    _state.RuntimeException,
    RuntimeError,
)


class OnnxRuntimeEngine:
    """One inference session; it holds the weights itself."""

    backend = Backend.ONNXRUNTIME

    def __init__(self, path: Path, spec: ComponentSpec, profile: ShapeProfile, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin between calls take cores from the processes that carry the events. Threads that do not spin
        # within a call either would have to be woken at each of its hundreds of operators, a fifth of its time.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3  # its many warnings about re-used buffers concern only speed
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except ORT_ERRORS as error:
            raise EngineLoadError(f"ONNX Runtime cannot load {path}: {error}") from error
        self._spec, self._profile = spec, profile

    def fits(self, shapes: Shapes) -> bool:
        return self._profile.takes(self._spec, shapes)

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        try:
            (output,) = self._session.run([self._spec.output.name], arrays)
        except ORT_ERRORS as error:
            if memory.host_refused(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise EngineRunError(f"ONNX Runtime failed: {error}") from error
        return torch.from_numpy(output)

    def close(self) -> None:
        del self._session
