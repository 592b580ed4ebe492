"""ONNX files for ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from export.build.base import BuildInputs, Built, Runner
from export.onnx import export_onnx
from export.spec import ComponentSpec


class OnnxRuntimeBuilder:
    """The ONNX graph is the engine: ONNX Runtime optimises it at load."""

    libraries: tuple[str, ...] = ("onnxruntime", "onnx", "onnxscript")

    def check(self) -> None:
        """Builds wherever torch runs."""

    def build(self, inputs: BuildInputs, folder: Path) -> Built:
        path = folder / f"{inputs.spec.component}.onnx"
        export_onnx(inputs.program(), inputs.spec, path)
        weights = path.with_name(f"{path.name}.data")  # where torch puts them when they do not fit into one protobuf
        return Built((path, weights) if weights.exists() else (path,))

    def load(self, path: Path, module: nn.Module, spec: ComponentSpec) -> Runner:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            outputs = session.run([spec.output.name], {name: t.cpu().numpy() for name, t in inputs.items()})
            return torch.from_numpy(outputs[0])

        return run
