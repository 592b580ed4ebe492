"""The denoiser's large matrix products in FP8: a second form of their weights, beside those in bf16.

e4m3 with one scale per row: each output channel of a weight has its own, computed once from the bf16 weight, and each
input token has its own, computed in every call (`export.kernels`). Eager keeps computing with the bf16 weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from export.kernels.reference import quantize
from export.modules.blocks import Foreign
from export.modules.denoiser import Denoiser
from export.modules.merged import merge_projections


class QuantizedLinear(nn.Module):
    """A linear layer without bias over quantised rows, in FP8; the result is bf16."""

    weight: Tensor  # e4m3 [out, in]
    scale: Tensor  # fp32 [1, out]

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        values, scales = quantize(weight)
        self.register_buffer("weight", values)
        self.register_buffer("scale", scales.reshape(1, -1))

    def forward(self, values: Tensor, scales: Tensor) -> Tensor:
        """`values` e4m3 [rows, in] and `scales` fp32 [rows, 1] -> bf16 [rows, out]."""
        return torch._scaled_mm(
            values,
            self.weight.t(),
            scale_a=scales,
            scale_b=self.scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,  # Hopper then sums in fewer bits than fp32, without stopping to promote partial sums
        )


def quantized_layers(denoiser: Denoiser) -> Sequence[Foreign]:
    """The main blocks except the first and the last: sparing these two removes a fifth of the demo's error."""
    layers: Foreign = denoiser.layers
    return list(layers)[1:-1]


def quantize_projections(denoiser: Denoiser) -> None:
    """Adds FP8 weights to `quantized_layers` beside their own; does nothing the second time."""
    merge_projections(denoiser)
    for layer in quantized_layers(denoiser):
        attention, feed_forward = layer.attention, layer.feed_forward
        if not hasattr(attention, "fp8_qkv"):
            attention.fp8_qkv = QuantizedLinear(attention.qkv)
            attention.fp8_out = QuantizedLinear(attention.to_out[0].weight)
            feed_forward.fp8_w13 = QuantizedLinear(feed_forward.w13)
            feed_forward.fp8_w2 = QuantizedLinear(feed_forward.w2.weight)
