"""Latents to pixels, with scaling, clamping and rounding inside the graph."""

import torch
from torch import Tensor, nn

from export.modules.blocks import Foreign


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
