"""The Triton kernels, as operators that torch.export keeps and AOTInductor compiles and packages.

One program handles one token, whose values stay in registers between its passes. Inductor's own kernels for
this read a token up to three times, and rotate at a quarter of the memory bandwidth (docs/performance-log.md). Each
operator computes what the function of the same name in `reference` defines.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from export.kernels.reference import PARTS, Quantized

WARPS = 8
WIDE_WARPS = 16  # for the rows between the feed-forward's products, which are 2.7 times as wide


@triton.jit
def _load(pointer, row, i, dim):
    return tl.load(pointer + row * dim + i, mask=i < dim, other=0.0).to(tl.float32)


@triton.jit
def _normalised(x, weight, i, dim, eps):
    return x * tl.rsqrt((tl.sum(x * x, 0) / dim + eps).to(tl.float32)) * _load(weight, 0, i, dim)


@triton.jit
def _part(modulation, sample, part, parts: tl.constexpr, i, dim):
    return _load(modulation, sample * parts + part, i, dim)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _modulated(x, weight, modulation, sample, part, parts: tl.constexpr, i, dim, eps):
    return _normalised(x, weight, i, dim, eps) * (1 + _part(modulation, sample, part, parts, i, dim))


@triton.jit
def _moved(x, branch, weight, modulation, row, sample, part, parts: tl.constexpr, i, dim, eps):
    gate = _tanh(_part(modulation, sample, part, parts, i, dim))
    return _load(x, row, i, dim) + gate * _normalised(_load(branch, row, i, dim), weight, i, dim, eps)


@triton.jit
def _store_quantized(y, values, scales, row, i, dim):
    # As `reference.quantize`: 448 is the largest value that e4m3 holds; 1e-12 keeps a row of zeros from dividing by 0.
    scale = tl.maximum(tl.max(tl.abs(y), 0) / 448.0, 1e-12)
    tl.store(values + row * dim + i, (y * (1.0 / scale)).to(values.dtype.element_ty), mask=i < dim)
    tl.store(scales + row, scale)


@triton.jit
def _norm_modulate(
    x, weight, modulation, out, part, tokens, eps, dim: tl.constexpr, parts: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    y = _modulated(_load(x, row, i, dim), weight, modulation, row // tokens, part, parts, i, dim, eps)
    tl.store(out + row * dim + i, y.to(out.dtype.element_ty), mask=i < dim)


@triton.jit
def _norm_modulate_quantize(
    x, weight, modulation, values, scales, part, tokens, eps,
    dim: tl.constexpr, parts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    y = _modulated(_load(x, row, i, dim), weight, modulation, row // tokens, part, parts, i, dim, eps)
    _store_quantized(y, values, scales, row, i, dim)


@triton.jit
def _gated_residual(
    x, branch, weight, modulation, out, part, tokens, eps, dim: tl.constexpr, parts: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    y = _moved(x, branch, weight, modulation, row, row // tokens, part, parts, i, dim, eps)
    tl.store(out + row * dim + i, y.to(out.dtype.element_ty), mask=i < dim)


@triton.jit
def _gated_residual_norm_modulate(
    x, branch, weight, modulation, part, next_weight, next_modulation, next_part, moved, out, tokens, eps,
    dim: tl.constexpr, parts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    sample = row // tokens
    y = _moved(x, branch, weight, modulation, row, sample, part, parts, i, dim, eps).to(moved.dtype.element_ty)
    tl.store(moved + row * dim + i, y, mask=i < dim)
    z = _modulated(y.to(tl.float32), next_weight, next_modulation, sample, next_part, parts, i, dim, eps)
    tl.store(out + row * dim + i, z.to(out.dtype.element_ty), mask=i < dim)


@triton.jit
def _gated_residual_norm_modulate_quantize(
    x, branch, weight, modulation, part, next_weight, next_modulation, next_part, moved, values, scales, tokens, eps,
    dim: tl.constexpr, parts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    sample = row // tokens
    y = _moved(x, branch, weight, modulation, row, sample, part, parts, i, dim, eps).to(moved.dtype.element_ty)
    tl.store(moved + row * dim + i, y, mask=i < dim)
    z = _modulated(y.to(tl.float32), next_weight, next_modulation, sample, next_part, parts, i, dim, eps)
    _store_quantized(z, values, scales, row, i, dim)


@triton.jit
def _quantize(x, values, scales, dim: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    _store_quantized(_load(x, row, i, dim), values, scales, row, i, dim)


@triton.jit
def _silu_product_quantize(gate_value, values, scales, dim: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    gate = _load(gate_value, 2 * row, i, dim)
    value = _load(gate_value, 2 * row + 1, i, dim)
    _store_quantized(gate * tl.sigmoid(gate) * value, values, scales, row, i, dim)


@triton.jit
def _norm_rotate(
    qkv, weight_q, weight_k, cos, sin, q, k, tokens, eps,
    heads: tl.constexpr, head_block: tl.constexpr, head_dim: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    keys = tl.program_id(1)  # 0: this program handles the queries, 1: the keys
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
    norm = tl.rsqrt((tl.sum(x * x, 1) / head_dim + eps).to(tl.float32))
    x = x * norm[:, None] * tl.load(weight + d).to(tl.float32)
    a, b = tl.split(tl.reshape(x, (head_block, pairs, 2)))
    angle = (row % tokens) * pairs + tl.arange(0, pairs)[None, :]
    c = tl.load(cos + angle)
    s = tl.load(sin + angle)
    y = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (head_block, head_dim))
    tl.store(out + row * width + head * head_dim + d, y.to(q.dtype.element_ty), mask=head < heads)


@triton.jit
def _norm_rotate_halves(
    qkv, weight_q, weight_k, cos, sin, q, k, heads, key_heads, eps, pairs: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)  # the queries' first, then the keys'
    d = tl.arange(0, block)
    x = qkv + (row * (heads + 2 * key_heads) + head) * 2 * pairs
    weight = weight_q
    out = q + (row * heads + head) * 2 * pairs
    if head >= heads:
        weight = weight_k
        out = k + (row * key_heads + head - heads) * 2 * pairs
    a, b = _load(x, 0, d, pairs), _load(x, 1, d, pairs)
    norm = tl.rsqrt(((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * pairs) + eps).to(tl.float32))
    a = a * norm * _load(weight, 0, d, pairs)
    b = b * norm * _load(weight, 1, d, pairs)
    first = a * _load(cos, 2 * row, d, pairs) - b * _load(sin, 2 * row, d, pairs)
    second = b * _load(cos, 2 * row + 1, d, pairs) + a * _load(sin, 2 * row + 1, d, pairs)
    tl.store(out + d, first.to(q.dtype.element_ty), mask=d < pairs)
    tl.store(out + pairs + d, second.to(q.dtype.element_ty), mask=d < pairs)


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
    """`gated_residual`, and `norm_modulate` of its result for the next product. All inputs are contiguous."""
    batch, tokens, dim = x.shape
    moved, out = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(dim)
    wrap_triton(_gated_residual_norm_modulate)[(batch * tokens,)](
        x, branch, weight, modulation, part, next_weight, next_modulation, next_part, moved, out, tokens, eps,
        dim, PARTS, block, num_warps=WARPS,
    )  # fmt: skip
    return moved, out


@triton_op("zserve::norm_modulate_quantize", mutates_args={})
def norm_modulate_quantize(
    x: Tensor, weight: Tensor, modulation: Tensor, part: int, eps: float
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_modulate_quantize`. All inputs are contiguous."""
    batch, tokens, dim = x.shape
    values, scales = _empty_quantized(x, batch * tokens, dim)
    block = triton.next_power_of_2(dim)
    wrap_triton(_norm_modulate_quantize)[(batch * tokens,)](
        x, weight, modulation, values, scales, part, tokens, eps, dim, PARTS, block, num_warps=WARPS
    )
    return values, scales


@triton_op("zserve::gated_residual_norm_modulate_quantize", mutates_args={})
def gated_residual_norm_modulate_quantize(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    modulation: Tensor,
    part: int,
    next_weight: Tensor,
    next_modulation: Tensor,
    next_part: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_residual`, and `norm_modulate_quantize` of its result for the next product. All inputs are contiguous."""
    batch, tokens, dim = x.shape
    moved = torch.empty_like(x)
    values, scales = _empty_quantized(x, batch * tokens, dim)
    block = triton.next_power_of_2(dim)
    wrap_triton(_gated_residual_norm_modulate_quantize)[(batch * tokens,)](
        x, branch, weight, modulation, part, next_weight, next_modulation, next_part, moved, values, scales, tokens,
        eps, dim, PARTS, block, num_warps=WARPS,
    )  # fmt: skip
    return moved, values, scales


@triton_op("zserve::quantize", mutates_args={})
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantize`. `x` [B, S, dim] is contiguous."""
    batch, tokens, dim = x.shape
    values, scales = _empty_quantized(x, batch * tokens, dim)
    wrap_triton(_quantize)[(batch * tokens,)](x, values, scales, dim, triton.next_power_of_2(dim), num_warps=WARPS)
    return values, scales


@triton_op("zserve::silu_product_quantize", mutates_args={})
def silu_product_quantize(gate_value: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.silu_product_quantize`. `gate_value` is contiguous."""
    rows, dim = gate_value.shape[0], gate_value.shape[1] // 2
    values, scales = _empty_quantized(gate_value, rows, dim)
    wrap_triton(_silu_product_quantize)[(rows,)](
        gate_value, values, scales, dim, triton.next_power_of_2(dim), num_warps=WIDE_WARPS
    )
    return values, scales


def _empty_quantized(like: Tensor, rows: int, dim: int) -> Quantized:
    return like.new_empty((rows, dim), dtype=torch.float8_e4m3fn), like.new_empty((rows, 1), dtype=torch.float32)


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


@triton_op("zserve::norm_rotate_halves", mutates_args={})
def norm_rotate_halves(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_rotate_halves`. All inputs are contiguous, head_dim is even."""
    batch, tokens, width = qkv.shape
    head_dim = weight_q.shape[0]
    key_heads = (width // head_dim - heads) // 2
    q = qkv.new_empty((batch, tokens, heads, head_dim))
    k = qkv.new_empty((batch, tokens, key_heads, head_dim))
    wrap_triton(_norm_rotate_halves)[(batch * tokens, heads + key_heads)](
        qkv, weight_q, weight_k, cos, sin, q, k, heads, key_heads, eps,
        head_dim // 2, triton.next_power_of_2(head_dim // 2), num_warps=1,
    )  # fmt: skip
    return q, k
