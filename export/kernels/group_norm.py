"""Group normalisation of channels-last images in Triton, and the decoder's other kernels that touch every pixel.

A normalisation needs sums over the whole image before it can begin. They are accumulated as an image is written anyway,
or in a separate pass, by a fixed number of programs, each over its share of the pixels; `affine` combines them and
leaves one multiplication and one addition per value, which Inductor fuses with what follows. Each operator computes
what the function of the same name in `reference` defines.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

PROGRAMS = 512  # about four on each multiprocessor of an H100
TILE = 4096  # values that a program handles at a time
WARPS = 4
CHUNK = 64  # programs' sums that are added up at a time


@triton.jit
def _share(pixels):
    """This program's pixels: the first, and one past the last."""
    share = tl.cdiv(pixels, tl.num_programs(0))
    first = tl.program_id(0).to(tl.int64) * share
    return first, tl.minimum(first + share, pixels)


@triton.jit
def _store_sums(sums, total, squares, c, channels):
    program = tl.program_id(0)
    tl.store(sums + 2 * program * channels + c, tl.sum(total, 0), mask=c < channels)
    tl.store(sums + (2 * program + 1) * channels + c, tl.sum(squares, 0), mask=c < channels)


@triton.jit
def _channel_sums(x, sums, pixels, channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr):
    c = tl.arange(0, block)
    first, last = _share(pixels)
    total = tl.zeros((rows, block), tl.float32)
    squares = tl.zeros((rows, block), tl.float32)
    for start in range(first, last, rows):
        pixel = start + tl.arange(0, rows)[:, None]
        inside = (pixel < last) & (c[None, :] < channels)
        value = tl.load(x + pixel * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
        total += value
        squares += value * value
    _store_sums(sums, total, squares, c, channels)


@triton.jit
def _add(x, branch, bias, out, sums, pixels, channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr):
    c = tl.arange(0, block)
    first, last = _share(pixels)
    total = tl.zeros((rows, block), tl.float32)
    squares = tl.zeros((rows, block), tl.float32)
    offset = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    for start in range(first, last, rows):
        pixel = start + tl.arange(0, rows)[:, None]
        at = pixel * channels + c[None, :]
        inside = (pixel < last) & (c[None, :] < channels)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32) + offset
        value = tl.where(inside, value, 0.0).to(out.dtype.element_ty)
        tl.store(out + at, value, mask=inside)
        value = value.to(tl.float32)
        total += value
        squares += value * value
    _store_sums(sums, total, squares, c, channels)


@triton.jit
def _interleave(
    phases, bias, out, sums, height, width, channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr
):
    c = tl.arange(0, block)
    pixels = 4 * height * width
    first, last = _share(pixels)
    total = tl.zeros((rows, block), tl.float32)
    squares = tl.zeros((rows, block), tl.float32)
    offset = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    for start in range(first, last, rows):
        pixel = start + tl.arange(0, rows)[:, None]
        i = pixel // (2 * width)
        j = pixel % (2 * width)
        # Odd rows and columns take the convolution's output at the next position.
        source = (i // 2 + i % 2) * (width + 1) + j // 2 + j % 2
        phase = 2 * (i % 2) + j % 2
        inside = (pixel < last) & (c[None, :] < channels)
        value = tl.load(phases + (4 * source + phase) * channels + c[None, :], mask=inside, other=0.0)
        value = tl.where(inside, value.to(tl.float32) + offset, 0.0).to(out.dtype.element_ty)
        tl.store(out + pixel * channels + c[None, :], value, mask=inside)
        value = value.to(tl.float32)
        total += value
        squares += value * value
    _store_sums(sums, total, squares, c, channels)


@triton.jit
def _affine(
    sums, weight, bias, offset, out, pixels, eps,
    channels: tl.constexpr, width: tl.constexpr, block: tl.constexpr, programs: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * width + tl.arange(0, block)  # of one group
    inside = tl.arange(0, block) < width
    total = tl.zeros((chunk, block), tl.float32)
    squares = tl.zeros((chunk, block), tl.float32)
    for start in range(0, programs, chunk):
        at = 2 * (start + tl.arange(0, chunk)[:, None]) * channels + c[None, :]
        total += tl.load(sums + at, mask=inside[None, :], other=0.0)
        squares += tl.load(sums + at + channels, mask=inside[None, :], other=0.0)
    moved = tl.load(offset + c, mask=inside, other=0.0).to(tl.float32)
    of_channel = tl.sum(total, 0)
    count = pixels * 1.0
    squared = tl.sum(squares, 0) + 2 * moved * of_channel + count * moved * moved
    mean = tl.sum(of_channel + count * moved, 0) / (count * width)
    variance = tl.maximum(tl.sum(squared, 0) / (count * width) - mean * mean, 0.0)
    scale = tl.rsqrt((variance + eps).to(tl.float32)) * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32) + (moved - mean) * scale
    tl.store(out + c, scale, mask=inside)
    tl.store(out + channels + c, shift, mask=inside)


@triton_op("zserve::channel_sums", mutates_args={})
def channel_sums(x: Tensor) -> Tensor:
    """See `reference.channel_sums`; here `PROGRAMS` shares. `x` is contiguous."""
    pixels, channels = x.shape
    sums = _empty_sums(x, channels)
    wrap_triton(_channel_sums)[(PROGRAMS,)](x, sums, pixels, channels, *_tile(channels), num_warps=WARPS)
    return sums


@triton_op("zserve::add", mutates_args={})
def add(x: Tensor, branch: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.add`; also returns the `channel_sums` of its result. All inputs are contiguous."""
    pixels, channels = x.shape
    out, sums = torch.empty_like(x), _empty_sums(x, channels)
    wrap_triton(_add)[(PROGRAMS,)](x, branch, bias, out, sums, pixels, channels, *_tile(channels), num_warps=WARPS)
    return out, sums


@triton_op("zserve::interleave", mutates_args={})
def interleave(phases: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.interleave`; also returns the `channel_sums` of its result. All inputs are contiguous."""
    height, width, channels = phases.shape[0] - 1, phases.shape[1] - 1, bias.shape[0]
    out, sums = phases.new_empty((4 * height * width, channels)), _empty_sums(phases, channels)
    wrap_triton(_interleave)[(PROGRAMS,)](
        phases, bias, out, sums, height, width, channels, *_tile(channels), num_warps=WARPS
    )
    return out, sums


@triton_op("zserve::affine", mutates_args={})
def affine(sums: Tensor, pixels: int, groups: int, weight: Tensor, bias: Tensor, offset: Tensor, eps: float) -> Tensor:
    """See `reference.affine`. All inputs are contiguous."""
    channels = weight.shape[0]
    out = sums.new_empty((2, channels))
    width = channels // groups
    wrap_triton(_affine)[(groups,)](
        sums, weight, bias, offset, out, pixels, eps,
        channels, width, triton.next_power_of_2(width), PROGRAMS, CHUNK, num_warps=4,
    )  # fmt: skip
    return out


def _tile(channels: int) -> tuple[int, int]:
    """The block that holds the channels, and the number of pixels per tile."""
    block = triton.next_power_of_2(channels)
    return block, max(TILE // block, 1)


def _empty_sums(like: Tensor, channels: int) -> Tensor:
    return like.new_empty((PROGRAMS, 2, channels), dtype=torch.float32)
