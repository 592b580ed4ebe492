"""AOTInductor packages: compiled code without weights, which the server lends from the eager module."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.build.base import BuildInputs, Built, Runner
from export.build.lowering import lowered
from export.errors import BuildError
from export.modules.denoiser import Denoiser
from export.modules.fused import fused
from export.packages import open_package
from export.profiles import tuning_example
from export.spec import ComponentSpec, Precision

# The weights stay outside: they are lent when the package is opened.
CONFIGS: dict[str, Any] = {"aot_inductor.package_constants_in_so": False}
# On CUDA also: channels-last convolutions, which Inductor avoids where sizes are dynamic; no copies that pad matrices,
# whose rows are aligned here anyway; several forms of each of its own kernels tried; and matrix products by cuBLAS
# alone, as Inductor would look for other forms of those in FP8 without being asked.
CUDA_CONFIGS: dict[str, Any] = {
    **CONFIGS,
    "force_layout_optimization": True,
    "shape_padding": False,
    "max_autotune_pointwise": True,
    "max_autotune_gemm_backends": "ATEN",
}


class AotInductorBuilder:
    """One `.pt2` a component, for the device the module is on."""

    libraries: tuple[str, ...] = ("torch",)

    def check(self, precision: Precision) -> None:
        """Builds wherever torch runs."""

    def build(self, inputs: BuildInputs, folder: Path) -> Built:
        path = folder / f"{inputs.spec.component}.pt2"
        program, configs = _prepared(inputs)
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
        except OSError as error:
            raise BuildError(
                f"AOTInductor could not compile {inputs.spec.component}: {error}. It needs a C++ compiler (g++) and, "
                "for a GPU, the CUDA toolkit: install them, and set CUDA_HOME where it is not found; or give "
                "--backend eager"
            ) from error
        finally:
            torch.compiler.reset()
        return Built((path,))

    def load(self, path: Path, module: nn.Module, spec: ComponentSpec) -> Runner:
        package = open_package(path, module)

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            output: Tensor = package(*inputs.values())
            return output

        return run


def _prepared(inputs: BuildInputs) -> tuple[ExportedProgram, dict[str, Any]]:
    """The component's program, and how Inductor is to compile it, on the device where the weights are."""
    module = inputs.module()
    on_cuda = next(module.parameters()).is_cuda
    if on_cuda and isinstance(module, Denoiser):
        module = fused(module, inputs.source.precision)
    if not on_cuda:
        return inputs.program(module), CONFIGS
    program = inputs.program(module, tuning_example(inputs.profiles))
    return lowered(program, inputs.spec.component), CUDA_CONFIGS
