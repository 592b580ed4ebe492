"""Latents to pixels, with scaling, clamping and rounding inside the graph."""

from typing import cast

import torch
from torch import Tensor, nn

from export.modules.blocks import Foreign

ATTENTION_SLICES = 4  # of the queries; divides h * w, as the latents' height and width are even


class ImageDecoder(nn.Module):
    """`latents` fp32 [B,C,h,w] -> image uint8 [B,8h,8w,3].

    `AutoencoderKL.decode` and `VaeImageProcessor.postprocess` of diffusers 0.42 in one graph, except that a bf16
    image is scaled to grey levels in fp32, so it is one level off diffusers' in places. Shares the VAE's weights.
    """

    def __init__(self, vae: Foreign) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.post_quant_conv = vae.post_quant_conv
        self.scaling: float = vae.config.scaling_factor
        self.shift: float = vae.config.shift_factor
        self.run_decoder = run_decoder  # or `export.modules.fused_decoder.run_decoder`

    def forward(self, latents: Tensor) -> Tensor:
        dtype = self.decoder.conv_in.weight.dtype
        z = latents.to(dtype) / self.scaling + self.shift
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        image: Tensor = self.run_decoder(self.decoder, z).float()
        image = (image * 0.5 + 0.5).clamp(0, 1) * 255
        # uint8 comes last: TensorRT supports it as an output type only.
        return image.round().permute(0, 2, 3, 1).to(torch.uint8)


def run_decoder(decoder: Foreign, z: Tensor) -> Tensor:
    """`z` [B,C,h,w] -> image [B,3,8h,8w], about -1 to 1."""
    image: Tensor = decoder(z)
    return image


def sliced_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention [S, d] as matrix products, for a head too wide for any fast fused kernel (d = 512).

    A quarter of the queries at a time, so that the scores take a quarter of the memory.
    """
    slices = (query * query.shape[1] ** -0.5).unflatten(0, (ATTENTION_SLICES, -1)).unbind()
    return torch.cat([torch.softmax(part @ key.T, -1) @ value for part in slices])


class SlicedAttention:
    """`AttnProcessor2_0` of diffusers for the VAE's attention, of one image and in slices.

    At 2048x2048 all scores at once have 2^32 elements: more than TensorRT can plan memory for beforehand.
    """

    def __call__(self, attention: Foreign, x: Tensor, *_: object, **__: object) -> Tensor:
        rows = attention.group_norm(x.flatten(2))[0].T
        mixed = sliced_attention(attention.to_q(rows), attention.to_k(rows), attention.to_v(rows))
        return x + cast(Tensor, attention.to_out[0](mixed)).T.reshape(x.shape)


def attend_in_slices(decoder: ImageDecoder) -> None:
    """Changes `decoder` to compute its attention in slices; from then on it takes one image per call."""
    for attention in decoder.decoder.mid_block.attentions:
        if attention is not None:  # as with `mid_block_add_attention` false in the VAE's config
            attention.processor = SlicedAttention()
