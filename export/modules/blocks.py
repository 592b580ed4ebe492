"""The transformer block that the denoiser and the caption refiners share, on plain tensors.

The modules passed in are diffusers' own, so their weights are shared and nothing is copied. Source:
`ZImageTransformerBlock` of diffusers 0.42.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from export.modules.rope import Rotation

Foreign = Any  # a module of diffusers or transformers, whose attributes carry no types


def rms_norm(norm: Foreign, x: Tensor) -> Tensor:
    """diffusers' RMSNorm, to the bit.

    torch's fused operator gives the same result in fp32. In bf16 it rounds in a different order, which adds up to about
    1 % over the denoiser, so bf16 runs diffusers' own module; compilers fuse either.
    """
    if x.dtype is torch.float32:
        return F.rms_norm(x, norm.dim, norm.weight, norm.eps)
    output: Tensor = norm(x)
    return output


def attention(module: Foreign, x: Tensor, rotation: Rotation) -> Tensor:
    """Self-attention over all of `x` [B, S, dim]; no mask, since every row of a batch has the same length."""
    q, k, v = (project(x).unflatten(-1, (module.heads, -1)) for project in (module.to_q, module.to_k, module.to_v))
    q = rotation.rotate(rms_norm(module.norm_q, q)).transpose(1, 2)
    k = rotation.rotate(rms_norm(module.norm_k, k)).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
    output: Tensor = module.to_out[0](mixed.transpose(1, 2).flatten(2))
    return output


def block(module: Foreign, x: Tensor, rotation: Rotation) -> Tensor:
    """A block without modulation, as in the caption refiners."""
    x = x + rms_norm(module.attention_norm2, attention(module.attention, rms_norm(module.attention_norm1, x), rotation))
    widened = module.feed_forward(rms_norm(module.ffn_norm1, x))
    return x + rms_norm(module.ffn_norm2, widened)


def modulated_block(module: Foreign, x: Tensor, rotation: Rotation, conditioning: Tensor) -> Tensor:
    """A block scaled and gated by the timestep: `conditioning` [B, 256]."""
    modulation = module.adaLN_modulation(conditioning).unsqueeze(1)
    scale_attention, gate_attention, scale_ffn, gate_ffn = modulation.chunk(4, dim=2)
    mixed = attention(module.attention, rms_norm(module.attention_norm1, x) * (1 + scale_attention), rotation)
    x = x + gate_attention.tanh() * rms_norm(module.attention_norm2, mixed)
    widened = module.feed_forward(rms_norm(module.ffn_norm1, x) * (1 + scale_ffn))
    moved: Tensor = x + gate_ffn.tanh() * rms_norm(module.ffn_norm2, widened)
    return moved
