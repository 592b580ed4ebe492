"""What the kernels compute, in plain PyTorch and in fp32 throughout; only results are rounded to the inputs' type.

`modulation` [B, 4 * dim] is a block's `adaLN_modulation` of the timestep: scale and gate of the attention, then scale
and gate of the feed-forward. `part` indexes these from 0. Source: `ZImageTransformerBlock.forward` and
`ZSingleStreamAttnProcessor` of diffusers 0.42.

Inputs of a product in FP8 are `Quantized`: e4m3 values [rows, width] and the factor to multiply each row by, fp32
[rows, 1], as `torch._scaled_mm` takes them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = 4
LARGEST = 448.0  # value that e4m3 holds
SMALLEST_SCALE = 1e-12  # so that a row of zeros is not divided by zero

Quantized = tuple[Tensor, Tensor]


def norm_modulate(x: Tensor, weight: Tensor, modulation: Tensor, part: int, eps: float) -> Tensor:
    """`x` [B, S, dim] normalised to a root mean square of 1, times `weight` [dim] and 1 + scale."""
    return (_normalised(x, weight, eps) * (1 + _part(modulation, part))).to(x.dtype)


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


def norm_rotate_halves(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries [B, S, heads, head_dim] and keys of `qkv`, normalised and rotated; a pair has a value of each half.

    `qkv` [B, S, (heads + 2 * key_heads) * head_dim]; `weight_q`, `weight_k` [head_dim]; `cos`, `sin` [B, S, head_dim].
    Source: `Qwen3Attention` and `apply_rotary_pos_emb` of transformers 5.
    """
    every = qkv.unflatten(-1, (-1, weight_q.shape[0]))  # type: ignore[no-untyped-call]
    key_heads = (every.shape[2] - heads) // 2
    q, k, _ = every.split([heads, key_heads, key_heads], 2)
    q = _halves_rotated(_normalised(q, weight_q, eps), cos, sin)
    k = _halves_rotated(_normalised(k, weight_k, eps), cos, sin)
    return q.to(qkv.dtype), k.to(qkv.dtype)


def quantize(x: Tensor) -> Quantized:
    """The rows of `x` [..., width], each scaled so that its largest value is the largest that e4m3 holds."""
    rows = x.float().flatten(0, -2)
    scales = (rows.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    return (rows / scales).to(torch.float8_e4m3fn), scales


def norm_modulate_quantize(x: Tensor, weight: Tensor, modulation: Tensor, part: int, eps: float) -> Quantized:
    """`norm_modulate`, with its result quantised without rounding it to `x`'s type first."""
    return quantize(_normalised(x, weight, eps) * (1 + _part(modulation, part)))


def swiglu(x: Tensor, w13: Tensor) -> Tensor:
    """`x` [tokens, dim] times the rows of `w13` [2 * hidden, dim]: SiLU of the first half times the second.

    Returns [tokens, hidden]. Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    gate, value = F.linear(x.float(), w13.float()).chunk(2, -1)
    return (F.silu(gate) * value).to(x.dtype)


def silu_product_quantize(gate_value: Tensor) -> Quantized:
    """SiLU of the first half of each row of `gate_value` [rows, 2 * width] times the second, quantised."""
    gate, value = gate_value.float().chunk(2, -1)
    return quantize(F.silu(gate) * value)


def channel_sums(x: Tensor) -> Tensor:
    """The sums of values and of squares per channel of `x` [pixels, C], fp32 [shares, 2, C]; here one share."""
    wide = x.float()
    return torch.stack([wide.sum(0), wide.square().sum(0)])[None]


def add(x: Tensor, branch: Tensor, bias: Tensor) -> Tensor:
    """`x` [pixels, C] plus `branch` [pixels, C] plus `bias` [C]."""
    return (x.float() + branch.float() + bias.float()).to(x.dtype)


def interleave(phases: Tensor, bias: Tensor) -> Tensor:
    """An image [2h * 2w, C] from its `phases` [h + 1, w + 1, 4 * C], plus `bias` [C].

    The phases are ordered: even row and even column, even and odd, odd and even, odd and odd. Odd rows are taken from
    the lower h rows of the phases, odd columns from the right w columns.
    """
    height, width = phases.shape[0] - 1, phases.shape[1] - 1
    quarters = phases.unflatten(2, (2, 2, -1))  # type: ignore[no-untyped-call]
    rows = [torch.stack([quarters[i : i + height, j : j + width, i, j] for j in (0, 1)], 2) for i in (0, 1)]
    return (torch.stack(rows, 1).float() + bias.float()).to(phases.dtype).flatten(0, 3)


def affine(sums: Tensor, pixels: int, groups: int, weight: Tensor, bias: Tensor, offset: Tensor, eps: float) -> Tensor:
    """Scale and shift per channel, fp32 [2, C], that group-normalise an image [pixels, C] plus `offset`.

    `sums` is `channel_sums` of the image; `weight`, `bias`, `offset` [C]. Source: Wu and He, Group Normalization, 2018.
    """
    moved = offset.float()
    total, squares = sums.sum(0)
    squares = squares + 2 * moved * total + pixels * moved.square()
    total, squares = ((s.reshape(groups, -1).mean(1) / pixels) for s in (total + pixels * moved, squares))
    mean, factor = (
        v.repeat_interleave(weight.shape[0] // groups)
        for v in (total, torch.rsqrt((squares - total.square()).clamp(min=0) + eps))
    )
    scale = factor * weight.float()
    return torch.stack([scale, bias.float() + (moved - mean) * scale])


def _part(modulation: Tensor, part: int) -> Tensor:
    return modulation.float().chunk(PARTS, -1)[part].unsqueeze(1)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def _halves_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(2).float() + torch.cat((-b, a), -1) * sin.unsqueeze(2).float()
