"""An AOTInductor package opened: what the export's check and the server's engine have in common."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from export.modules.denoiser import Denoiser
from export.modules.fused import merge_projections

if TYPE_CHECKING:
    from torch.export.pt2_archive._package import AOTICompiledModel


def open_package(path: Path, module: nn.Module) -> "AOTICompiledModel":
    """The package at `path`, computing with the weights of `module`, on the device where these are.

    The weights are lent, not copied: changing one in place changes both.

    Raises:
        RuntimeError: it is damaged, or of another torch or device.
        KeyError: it wants a weight that `module` does not have.
    """
    device = next(module.parameters()).device
    index = -1 if device.index is None else device.index  # else it would compute on the first GPU
    # One thread drives the device, and CUDA graphs need it so.
    package = torch._inductor.aoti_load_package(str(path), run_single_threaded=True, device_index=index)
    wanted = package.get_constant_fqns()
    held = _weights(module)
    if isinstance(module, Denoiser) and not held.keys() >= set(wanted):
        merge_projections(module)  # the package was compiled from the fused form
        held = _weights(module)
    package.load_constants({name: held[name] for name in wanted}, check_full_update=True, user_managed=True)
    return package


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
