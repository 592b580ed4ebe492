"""AOTInductor packages: compiled code without weights, which the server lends from the eager module."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from export.build.base import BuildInputs, Built, Runner
from export.errors import BuildError
from export.packages import open_package
from export.spec import ComponentSpec, Precision


class AotInductorBuilder:
    """One `.pt2` a component, for the device the module is on."""

    libraries: tuple[str, ...] = ("torch",)

    def check(self, precision: Precision) -> None:
        """Builds wherever torch runs."""

    def build(self, inputs: BuildInputs, folder: Path) -> Built:
        path = folder / f"{inputs.spec.component}.pt2"
        try:
            torch._inductor.aoti_compile_and_package(
                inputs.program(),
                package_path=str(path),
                inductor_configs={"aot_inductor.package_constants_in_so": False},
            )
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
