"""Everything that runs once per step: latents, timestep and encoded caption in, velocity out.

A re-expression of diffusers 0.42's `ZImageTransformer2DModel.forward` for one caption and one image per row, without
its lists, masks and complex numbers. It equals diffusers exactly when all rows share the padded caption length and the
image size, which is how the server batches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.modules.blocks import Foreign, modulated_block
from export.modules.rope import RotaryTables, Rotation
from export.spec import CAPTION_MULTIPLE


class Denoiser(nn.Module):
    """`latents` fp32 [B,C,h,w], `timestep` fp32 [B] (= 1 - sigma), `caption` fp32 [B,T,dim] -> velocity fp32 [B,C,h,w].

    velocity = d latents / d sigma, so one Euler step is `latents + (next_sigma - sigma) * velocity`. h and w are even,
    T is a multiple of 32. Shares the weights of the diffusers transformer it is given.
    """

    def __init__(self, transformer: Foreign) -> None:
        super().__init__()
        config = transformer.config
        self.t_scale: float = config.t_scale
        self.t_embedder = transformer.t_embedder
        self.x_embedder = transformer.all_x_embedder["2-1"]
        self.x_pad_token = transformer.x_pad_token
        self.noise_refiner = transformer.noise_refiner
        self.layers = transformer.layers
        self.final_layer = transformer.all_final_layer["2-1"]
        self.rope = RotaryTables(config.axes_dims, config.axes_lens, config.rope_theta)
        self.run_blocks = run_blocks  # or `export.modules.fused.run_blocks`

    def forward(self, latents: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        height, width = latents.shape[2:]
        rows, columns = height // 2, width // 2
        tokens = rows * columns
        padded = (tokens + CAPTION_MULTIPLE - 1) // CAPTION_MULTIPLE * CAPTION_MULTIPLE
        dtype = self.x_embedder.weight.dtype

        conditioning = self.t_embedder(timestep * self.t_scale).to(dtype)
        x = self.x_embedder(_patchify(latents.to(dtype)))
        # Written with pad and where: AOTInductor (torch 2.13) miscompiles concatenating a dynamic number of tokens.
        missing = (0, padded - tokens)
        inside = torch.arange(padded, device=latents.device) < tokens
        x = torch.where(inside.unsqueeze(-1), F.pad(x, (0, 0, *missing)), self.x_pad_token.to(dtype))
        positions = image_positions(rows, columns, caption.shape[1], latents.device)
        image_rotation = self.rope([F.pad(axis, missing).unsqueeze(0) for axis in positions])
        x = self.run_blocks(list(self.noise_refiner), x, image_rotation, conditioning)
        x = torch.cat([x, caption.to(dtype)], 1)
        caption_rotation = self.rope(caption_positions(caption.shape[1], caption.device))
        rotation = image_rotation.followed_by(caption_rotation)
        x = self.run_blocks(list(self.layers), x, rotation, conditioning)
        x = self.final_layer(x[:, :tokens], c=conditioning)
        return -_unpatchify(x, rows, columns).float()


def run_blocks(layers: Sequence[Foreign], x: Tensor, rotation: Rotation, conditioning: Tensor) -> Tensor:
    """`x` [B, S, dim] through all of `layers`, scaled and gated by `conditioning` [B, 256]."""
    for layer in layers:
        x = modulated_block(layer, x, rotation, conditioning)
    return x


def image_positions(rows: int, columns: int, length: int, device: torch.device) -> list[Tensor]:
    """Positions (length + 1, row, column) of an image's tokens, row by row, each [rows * columns]."""
    row = torch.arange(rows, device=device).unsqueeze(1).expand(rows, columns).reshape(rows * columns)
    column = torch.arange(columns, device=device).unsqueeze(0).expand(rows, columns).reshape(rows * columns)
    return [torch.ones_like(row) * (length + 1), row, column]


def caption_positions(length: int, device: torch.device) -> list[Tensor]:
    """Positions (1..length, 0, 0) of a caption padded to `length` tokens, each [1, length]."""
    index = torch.arange(1, length + 1, device=device).unsqueeze(0)
    return [index, torch.zeros_like(index), torch.zeros_like(index)]


def _patchify(latents: Tensor) -> Tensor:
    """[B, C, 2r, 2c] -> [B, r * c, 4C], with each patch's values ordered (row, column, channel)."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // 2) * (width // 2), 4 * channels)


def _unpatchify(x: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `_patchify`."""
    batch, _, values = x.shape
    x = x.reshape(batch, rows, columns, 2, 2, values // 4)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, values // 4, 2 * rows, 2 * columns)
