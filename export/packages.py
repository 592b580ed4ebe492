"""Opens AOTInductor packages, for the export's check and the server's engine."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from export.modules.denoiser import Denoiser
from export.modules.merged import merge_projections
from export.modules.prompt_encoder import PromptEncoder
from export.modules.quantized import quantize_projections

if TYPE_CHECKING:
    from torch.export.pt2_archive._package import AOTICompiledModel

MODEL = "model"  # torch's name of what a package holds, unless it is told another


def open_package(path: Path, module: nn.Module) -> "AOTICompiledModel":
    """The package at `path`, computing with the weights of `module`, on the device where these are.

    The weights are lent, not copied: changing one in place changes both.

    Raises:
        RuntimeError: it is damaged, or of another torch or device.
        KeyError: it wants a weight that `module` does not have.
    """
    from torch.export.pt2_archive._package import AOTICompiledModel  # a second; most of this project does without it

    import export.kernels.attention  # noqa: F401 - an operator that packages may call

    device = next(module.parameters()).device
    index = -1 if device.index is None else device.index  # else it would compute on the first GPU
    # Not by torch._inductor.aoti_load_package, which imports Inductor to warn of another device first (the manifest
    # check already covers that): 2 s of each start, and many times that where Python keeps no bytecode. True: one
    # thread drives the device, and CUDA graphs need it so.
    package = AOTICompiledModel(torch._C._aoti.AOTIModelPackageLoader(str(path), MODEL, True, 1, index))
    wanted = package.get_constant_fqns()
    held = prepare_weights(module, set(wanted))
    package.load_constants({name: held[name] for name in wanted}, check_full_update=True, user_managed=True)
    return package


def prepare_weights(module: nn.Module, wanted: set[str]) -> dict[str, Tensor]:
    """Merges and quantises projections of `module` in place if the package wants them so; returns its weights."""
    # Nothing may hold on to the weights while they are merged: their memory is given back to the device as it goes.
    if isinstance(module, Denoiser | PromptEncoder) and not _weights(module).keys() >= wanted:
        merge_projections(module)
    if isinstance(module, Denoiser) and not _weights(module).keys() >= wanted:
        quantize_projections(module)
    return _weights(module)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
