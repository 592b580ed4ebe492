"""ONNX files for ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from export.build.base import BuildInputs, BuildOptions, Built, Runner
from export.errors import UnsupportedError
from export.modules.rope import with_onnx_rotation
from export.onnx import LIBRARIES, export_onnx
from export.spec import ComponentSpec, Precision


class OnnxRuntimeBuilder:
    """The ONNX graph is the engine: ONNX Runtime optimises it at load."""

    libraries: tuple[str, ...] = ("onnxruntime", *LIBRARIES)

    def __init__(self, options: BuildOptions) -> None:
        self._options = options

    def check(self, precision: Precision) -> None:
        if any(target.device != "cpu" for target in self._options.targets):
            raise UnsupportedError(
                "--backend onnxruntime runs on the CPU only (its CPU package is used); give --device cpu, or "
                "--backend aotinductor for a GPU"
            )
        if precision is not Precision.FP32:
            raise UnsupportedError(
                f"--backend onnxruntime computes in fp32 only, as ONNX Runtime's CPU kernels lack {precision}; give "
                "--precision fp32, or --backend aotinductor"
            )

    def build(self, inputs: BuildInputs, folder: Path) -> Built:
        path = folder / f"{inputs.spec.component}.onnx"
        export_onnx(inputs.program(with_onnx_rotation(inputs.module())), inputs.spec, path)
        weights = path.with_name(f"{path.name}.data")  # where torch puts them when they do not fit into one protobuf
        return Built((path, weights) if weights.exists() else (path,))

    def load(self, path: Path, module: nn.Module, spec: ComponentSpec) -> Runner:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            outputs = session.run([spec.output.name], {name: t.cpu().numpy() for name, t in inputs.items()})
            return torch.from_numpy(outputs[0])

        return run
