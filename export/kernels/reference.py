"""What the kernels compute, in plain PyTorch and in fp32 throughout; only results are rounded to the inputs' type.

`modulation` [B, 4 * dim] is what `adaLN_modulation` of a block makes of the timestep: scale and gate of the attention,
then scale and gate of the feed-forward. `part` counts them from 0. Source: `ZImageTransformerBlock.forward` and
`ZSingleStreamAttnProcessor` of diffusers 0.42.
"""

import torch
from torch import Tensor

PARTS = 4


def norm_modulate(x: Tensor, weight: Tensor, modulation: Tensor, part: int, eps: float) -> Tensor:
    """`x` [B, S, dim] normalised to a root mean square of 1, times `weight` [dim] and 1 + scale."""
    scale = _part(modulation, part)
    return (_normalised(x, weight, eps) * (1 + scale)).to(x.dtype)


def gated_residual(x: Tensor, branch: Tensor, weight: Tensor, modulation: Tensor, part: int, eps: float) -> Tensor:
    """`x` [B, S, dim] plus tanh(gate) times the normalised `branch` [B, S, dim]."""
    gate = _part(modulation, part).tanh()
    return (x.float() + gate * _normalised(branch, weight, eps)).to(x.dtype)


def norm_rotate(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, S, heads, head_dim] of `qkv` [B, S, 3 * heads * head_dim], normalised and rotated.

    `weight_q`, `weight_k` [head_dim]; `cos`, `sin` fp32 [S, head_dim / 2].
    """
    head_dim = weight_q.shape[0]
    q, k, _ = (part.reshape(*part.shape[:2], -1, head_dim) for part in qkv.chunk(3, -1))
    return tuple(_rotated(_normalised(x, w, eps), cos, sin).to(qkv.dtype) for x, w in ((q, weight_q), (k, weight_k)))  # type: ignore[return-value]


def _part(modulation: Tensor, part: int) -> Tensor:
    return modulation.float().chunk(PARTS, -1)[part].unsqueeze(1)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
