"""AOTInductor packages: compiled code without weights, which the server lends from the eager module."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from export.build.base import BuildInputs, Built, Runner
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
        finally:
            torch.compiler.reset()
        return Built((path,))

    def load(self, path: Path, module: nn.Module, spec: ComponentSpec) -> Runner:
        package = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        held = shared_constants(module)
        wanted = {name: held[name] for name in package.get_constant_fqns()}
        package.load_constants(wanted, check_full_update=True, user_managed=True)

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            output: Tensor = package(*inputs.values())
            return output

        return run


def shared_constants(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and buffers by the names a package asks for them."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
