"""Fits the linear map from latents to small RGB previews.

The VAE's latents are close to linear in local colour, so a 16x3 matrix gives a recognisable thumbnail at a tiny part
of a decode's cost. The fit is least squares over random colour fields, smooth and in blocks, sent through the VAE's
own encoder.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from export.errors import CheckpointError
from export.manifest import PreviewProjection
from export.modules.blocks import Foreign
from export.modules.load import load_vae
from export.spec import PIXELS_PER_LATENT

SIZE = 128  # pixels a side of a field
FIELDS = 8  # of each kind


def fit_preview(checkpoint: Path) -> PreviewProjection:
    """The projection of the checkpoint's VAE, for latents as the denoiser sees them.

    Raises:
        CheckpointError: the VAE's encoder is not whole, or does not work.
    """
    vae: Foreign = load_vae(checkpoint)
    images = _colour_fields()
    with torch.inference_mode():
        encoded = vae.encode(images * 2 - 1).latent_dist.mode()
    if not encoded.isfinite().all():
        raise CheckpointError(
            f"the encoder in {checkpoint / 'vae'} makes numbers of pictures that are not finite; download it again"
        )
    latents = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    colours = (F.avg_pool2d(images, PIXELS_PER_LATENT) * 255).permute(0, 2, 3, 1).flatten(0, 2)
    with_bias = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    solution = torch.linalg.lstsq(with_bias, colours).solution.tolist()
    return PreviewProjection(tuple(tuple(row) for row in solution[:-1]), tuple(solution[-1]))


def _colour_fields() -> Tensor:
    """[N, 3, SIZE, SIZE] in 0..1: coarse noise, interpolated smoothly and not at all, over the whole range."""
    generator = torch.Generator().manual_seed(0)
    kinds = [(cells, mode) for cells in (2, 4, 8) for mode in ("bicubic", "nearest")]
    fields = [
        F.interpolate(torch.rand(FIELDS, 3, cells, cells, generator=generator), (SIZE, SIZE), mode=mode)
        for cells, mode in kinds
    ]
    return ((torch.cat(fields) - 0.5) * 1.4 + 0.5).clamp(0, 1)
