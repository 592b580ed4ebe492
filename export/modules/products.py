"""A block's four large matrix products, and the kernels that compute their inputs, in two forms.

Both forms have the same methods. `qkv` and `feed_forward` take what `norm_modulate` returns: a tensor in one form,
values and scales in the other.
"""

import torch.nn.functional as F
from torch import Tensor

from export.kernels import swiglu
from export.kernels import triton_kernels as kernels
from export.kernels.reference import Quantized
from export.modules.blocks import Foreign


class PlainProducts:
    """The products in the type of the weights."""

    norm_modulate = staticmethod(kernels.norm_modulate)
    gated_residual_norm_modulate = staticmethod(kernels.gated_residual_norm_modulate)

    def __init__(self, block: Foreign) -> None:
        self._attention, self._feed_forward = block.attention, block.feed_forward

    def qkv(self, h: Tensor) -> Tensor:
        """Queries, keys and values, concatenated."""
        return F.linear(h, self._attention.qkv)

    def attention_output(self, mixed: Tensor) -> Tensor:
        """The projection after the attention."""
        output: Tensor = self._attention.to_out[0](mixed)
        return output

    def feed_forward(self, h: Tensor) -> Tensor:
        """All samples' tokens, flattened to [B * S, dim]."""
        # With a dynamic batch, Inductor would copy w2's input to flatten it.
        h, w13 = h.flatten(0, 1), self._feed_forward.w13
        if swiglu.suits(h, w13):
            widened = swiglu.swiglu(h, w13)
        else:
            gate, value = F.linear(h, w13).chunk(2, -1)
            widened = F.silu(gate) * value
        output: Tensor = self._feed_forward.w2(widened)
        return output


class QuantizedProducts:
    """The products in FP8, tokens always flattened; each row is quantised by the kernel that computes it."""

    def __init__(self, block: Foreign) -> None:
        self._attention, self._feed_forward = block.attention, block.feed_forward

    @staticmethod
    def norm_modulate(x: Tensor, weight: Tensor, modulation: Tensor, part: int, eps: float) -> Quantized:
        """See `reference.norm_modulate_quantize`."""
        values, scales = kernels.norm_modulate_quantize(x, weight, modulation, part, eps)
        return values, scales

    @staticmethod
    def gated_residual_norm_modulate(*arguments: Foreign) -> tuple[Tensor, Quantized]:
        """See `kernels.gated_residual_norm_modulate_quantize`, which takes the same arguments."""
        moved, values, scales = kernels.gated_residual_norm_modulate_quantize(*arguments)
        return moved, (values, scales)

    def qkv(self, h: Quantized) -> Tensor:
        """As `PlainProducts.qkv`."""
        output: Tensor = self._attention.fp8_qkv(*h)
        return output

    def attention_output(self, mixed: Tensor) -> Tensor:
        """As `PlainProducts.attention_output`."""
        output: Tensor = self._attention.fp8_out(*kernels.quantize(mixed))
        return output

    def feed_forward(self, h: Quantized) -> Tensor:
        """As `PlainProducts.feed_forward`."""
        gate_value = self._feed_forward.fp8_w13(*h)
        output: Tensor = self._feed_forward.fp8_w2(*kernels.silu_product_quantize(gate_value))
        return output
