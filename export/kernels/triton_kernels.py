"""The kernels in Triton's language, as operators that torch.export keeps and AOTInductor compiles and packages.

One program handles one token, whose values stay in registers between its passes. Inductor's own kernels for the same
read a token up to three times, and rotate at a quarter of the memory's speed (docs/performance-log.md). Each operator
computes what the function of its name in `reference` says.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from export.kernels.reference import PARTS

WARPS = 8


@triton.jit
def _load(pointer, row, i, dim):
    return tl.load(pointer + row * dim + i, mask=i < dim, other=0.0).to(tl.float32)


@triton.jit
def _normalised(x, weight, i, dim, eps):
    return x * tl.rsqrt(tl.sum(x * x, 0) / dim + eps) * _load(weight, 0, i, dim)


@triton.jit
def _part(modulation, sample, part, parts: tl.constexpr, i, dim):
    return _load(modulation, sample * parts + part, i, dim)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _norm_modulate(
    x, weight, modulation, out, part, tokens, eps, dim: tl.constexpr, parts: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    scale = _part(modulation, row // tokens, part, parts, i, dim)
    y = _normalised(_load(x, row, i, dim), weight, i, dim, eps) * (1 + scale)
    tl.store(out + row * dim + i, y.to(out.dtype.element_ty), mask=i < dim)


@triton.jit
def _gated_residual(
    x, branch, weight, modulation, out, part, tokens, eps, dim: tl.constexpr, parts: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    gate = _tanh(_part(modulation, row // tokens, part, parts, i, dim))
    y = _load(x, row, i, dim) + gate * _normalised(_load(branch, row, i, dim), weight, i, dim, eps)
    tl.store(out + row * dim + i, y.to(out.dtype.element_ty), mask=i < dim)


@triton.jit
def _gated_residual_norm_modulate(
    x, branch, weight, modulation, part, next_weight, next_modulation, next_part, moved, out, tokens, eps,
    dim: tl.constexpr, parts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    gate = _tanh(_part(modulation, row // tokens, part, parts, i, dim))
    y = _load(x, row, i, dim) + gate * _normalised(_load(branch, row, i, dim), weight, i, dim, eps)
    rounded = y.to(moved.dtype.element_ty)
    tl.store(moved + row * dim + i, rounded, mask=i < dim)
    scale = _part(next_modulation, row // tokens, next_part, parts, i, dim)
    z = _normalised(rounded.to(tl.float32), next_weight, i, dim, eps) * (1 + scale)
    tl.store(out + row * dim + i, z.to(out.dtype.element_ty), mask=i < dim)


@triton.jit
def _norm_rotate(
    qkv, weight_q, weight_k, cos, sin, q, k, tokens, eps,
    heads: tl.constexpr, head_block: tl.constexpr, head_dim: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    keys = tl.program_id(1)  # 0: this program does the queries, 1: the keys
    pairs: tl.constexpr = head_dim // 2
    head = tl.arange(0, head_block)[:, None]
    d = tl.arange(0, head_dim)[None, :]
    width = heads * head_dim
    x = tl.load(qkv + row * 3 * width + keys * width + head * head_dim + d, mask=head < heads, other=0.0)
    x = x.to(tl.float32)
    weight = weight_q
    out = q
    if keys == 1:
        weight = weight_k
        out = k
    norm = tl.rsqrt(tl.sum(x * x, 1) / head_dim + eps)
    x = x * norm[:, None] * tl.load(weight + d).to(tl.float32)
    a, b = tl.split(tl.reshape(x, (head_block, pairs, 2)))
    angle = (row % tokens) * pairs + tl.arange(0, pairs)[None, :]
    c = tl.load(cos + angle)
    s = tl.load(sin + angle)
    y = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (head_block, head_dim))
    tl.store(out + row * width + head * head_dim + d, y.to(q.dtype.element_ty), mask=head < heads)


@triton_op("zserve::norm_modulate", mutates_args={})
def norm_modulate(x: Tensor, weight: Tensor, modulation: Tensor, part: int, eps: float) -> Tensor:
    """See `reference.norm_modulate`. All inputs are contiguous."""
    batch, tokens, dim = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(dim)
    wrap_triton(_norm_modulate)[(batch * tokens,)](
        x, weight, modulation, out, part, tokens, eps, dim, PARTS, block, num_warps=WARPS
    )
    return out


@triton_op("zserve::gated_residual", mutates_args={})
def gated_residual(x: Tensor, branch: Tensor, weight: Tensor, modulation: Tensor, part: int, eps: float) -> Tensor:
    """See `reference.gated_residual`. All inputs are contiguous."""
    batch, tokens, dim = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(dim)
    wrap_triton(_gated_residual)[(batch * tokens,)](
        x, branch, weight, modulation, out, part, tokens, eps, dim, PARTS, block, num_warps=WARPS
    )
    return out


@triton_op("zserve::gated_residual_norm_modulate", mutates_args={})
def gated_residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    modulation: Tensor,
    part: int,
    next_weight: Tensor,
    next_modulation: Tensor,
    next_part: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, and `norm_modulate` of its result for what comes next. All inputs are contiguous."""
    batch, tokens, dim = x.shape
    moved, out = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(dim)
    wrap_triton(_gated_residual_norm_modulate)[(batch * tokens,)](
        x, branch, weight, modulation, part, next_weight, next_modulation, next_part, moved, out, tokens, eps,
        dim, PARTS, block, num_warps=WARPS,
    )  # fmt: skip
    return moved, out


@triton_op("zserve::norm_rotate", mutates_args={})
def norm_rotate(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_rotate`. All inputs are contiguous, head_dim a power of two."""
    batch, tokens, width = qkv.shape
    head_dim = weight_q.shape[0]
    heads = width // 3 // head_dim
    q = qkv.new_empty((batch, tokens, heads, head_dim))
    k = torch.empty_like(q)
    wrap_triton(_norm_rotate)[(batch * tokens, 2)](
        qkv, weight_q, weight_k, cos, sin, q, k, tokens, eps,
        heads, triton.next_power_of_2(heads), head_dim, num_warps=WARPS,
    )  # fmt: skip
    return q, k
