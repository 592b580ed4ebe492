"""AOTInductor packages: compiled code without weights, which the server lends from the eager module."""

import errno
import os
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.build.base import BuildInputs, Built, Runner
from export.build.corrections import corrected_code
from export.errors import BuildError, ResourcesError, UnsupportedError
from export.hubs import is_disk_full
from export.kernels import attention as flash
from export.modules.denoiser import Denoiser
from export.modules.fused import fused
from export.modules.fused_decoder import fused_decoder
from export.modules.fused_encoder import fused_encoder
from export.modules.image_decoder import ImageDecoder
from export.modules.prompt_encoder import PromptEncoder
from export.packages import open_package
from export.profiles import tuning_example
from export.spec import Component, ComponentSpec, Precision
from export.validity import FLASH_ATTENTION, cpu_instructions

# The weights stay outside: they are lent when the package is opened. On a CPU the server sets the number of threads
# then; by default Inductor may bake in the number here.
CONFIGS: dict[str, Any] = {"aot_inductor.package_constants_in_so": False, "cpp.dynamic_threads": True}
# On CUDA also: channels-last convolutions, which Inductor avoids with dynamic sizes; no copies that pad matrices, whose
# rows are aligned here anyway; autotuning of Inductor's own kernels; and matrix products by cuBLAS alone, because
# Inductor would autotune those in FP8 without being asked.
CUDA_CONFIGS: dict[str, Any] = {
    **CONFIGS,
    "force_layout_optimization": True,
    "shape_padding": False,
    "max_autotune_pointwise": True,
    "max_autotune_gemm_backends": "ATEN",
}
# The remedy when a compiler or the CUDA toolkit is missing or does not work.
TOOLS = (
    ". It needs a C++ compiler (g++) and, for a GPU, the CUDA toolkit: install them, and set CUDA_HOME where it is not "
    "found; or give --backend eager"
)


class AotInductorBuilder:
    """One `.pt2` per component, for the device the module is on."""

    libraries: tuple[str, ...] = ("torch",)

    def check(self, precision: Precision) -> None:
        """Builds wherever torch runs, if Inductor's commands, which do not quote paths, can name its files."""
        folders = (torch.__file__, tempfile.gettempdir(), os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
        spaced = [folder for folder in folders if " " in folder]
        if spaced:
            raise UnsupportedError(
                f"AOTInductor compiles only in folders that have no spaces in their paths, not in {', '.join(spaced)}; "
                "set TMPDIR or TORCHINDUCTOR_CACHE_DIR, make the virtual environment elsewhere, or give --backend eager"
            )

    def build(self, inputs: BuildInputs, folder: Path) -> Built:
        path = folder / f"{inputs.spec.component}.pt2"
        module = inputs.module()
        device = next(module.parameters()).device
        program, configs = _prepared(inputs, module, device)
        package = BytesIO()  # without its weights it is small; torch's own writer ends the process when a disk is full
        try:
            with corrected_code():
                torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=configs)
        except (OSError, RuntimeError) as error:
            cause: Exception = getattr(error, "inner_exception", error)  # Inductor wraps most errors
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            if is_disk_full(cause):
                raise ResourcesError(
                    f"AOTInductor could not compile {inputs.spec.component}: {_of_disk(cause)}; free some, or set "
                    "TMPDIR and TORCHINDUCTOR_CACHE_DIR to folders on another disk"
                ) from error
            remedy = TOOLS if _is_of_tools(cause) else ""
            raise BuildError(f"AOTInductor could not compile {inputs.spec.component}: {error}{remedy}") from error
        finally:
            torch.compiler.reset()
        path.write_bytes(package.getbuffer())
        return Built(
            (path,),
            calls=called_libraries(inputs.spec.component, inputs.source.precision, device),
            instructions=cpu_instructions() if device.type == "cpu" else (),  # it is compiled for this very CPU
        )

    def load(self, path: Path, module: nn.Module, spec: ComponentSpec) -> Runner:
        package = open_package(path, module)

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            output: Tensor = package(*inputs.values())
            return output

        return run


def called_libraries(component: Component, precision: Precision, device: torch.device) -> tuple[str, ...]:
    """The libraries that a package built here now calls; the calls are in `export.modules.fused`."""
    fuses = component is Component.DENOISER and precision.weights is Precision.BF16
    return (FLASH_ATTENTION,) if fuses and flash.is_there(device) else ()


def _of_disk(error: Exception) -> str:
    """What `error` says of a full disk, without the compiler's whole command."""
    said = str(error)
    return next((line for line in said.splitlines() if os.strerror(errno.ENOSPC) in line), said)


def _is_of_tools(error: Exception) -> bool:
    """Whether `error` is about a compiler or the CUDA toolkit."""
    from torch._inductor.exc import InvalidCxxCompiler  # imports Inductor, which is loaded by now anyway

    return isinstance(error, OSError | InvalidCxxCompiler)


def _prepared(inputs: BuildInputs, module: nn.Module, device: torch.device) -> tuple[ExportedProgram, dict[str, Any]]:
    """The component's program and Inductor's settings for it, for the device that holds the weights."""
    if device.type != "cuda":
        return inputs.program(module), CONFIGS
    match module:
        case PromptEncoder():
            module = fused_encoder(module)
        case Denoiser():
            module = fused(module, inputs.source.precision)
        case ImageDecoder():
            module = fused_decoder(module)
    return inputs.program(module, tuning_example(inputs.profiles)), CUDA_CONFIGS
