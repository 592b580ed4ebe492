"""The feed-forward's first matrix product with the SwiGLU fused into it, in Triton, for Hopper.

The gate and the value of a channel are computed by the same program, so neither is written to memory: as three kernels
they cost 340 MB of traffic per block at 1024x1024. Persistent; tiles move by the tensor memory accelerator (TMA).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from export.kernels.hopper import is_hopper

# A tile's tokens, its channels (each a gate and a value), and its step along the reduction dimension. It fills a
# multiprocessor's registers and, with three steps in flight, its shared memory.
TOKENS, CHANNELS, STEP = 128, 128, 64
STAGES, WARPS = 3, 8
# Rows of tiles that are processed together, so that what they share stays in the cache.
ROWS = 8


@triton.jit
def _place(index, down, across: tl.constexpr, rows: tl.constexpr):
    """The row and the column of the `index`-th tile."""
    first = index // (rows * across) * rows
    height = min(down - first, rows)
    rest = index % (rows * across)
    return first + rest % height, rest // height


@triton.jit
def _tile(
    xs, ws, outs, token, channel, depth: tl.constexpr, height: tl.constexpr, width: tl.constexpr, step: tl.constexpr
):
    both = tl.zeros((height, 2 * width), tl.float32)
    for k in range(0, depth, step):
        both = tl.dot(xs.load([token, k]), ws.load([0, channel, k]).reshape(2 * width, step).T, both)
    gate, value = tl.split(tl.permute(tl.reshape(both, (height, 2, width)), (0, 2, 1)))
    outs.store([token, channel], (gate * tl.sigmoid(gate) * value).to(outs.dtype))


@triton.jit
def _swiglu(
    x, w, out, tokens, depth: tl.constexpr, hidden: tl.constexpr, programs: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, step: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = width // 2
    xs = tl.make_tensor_descriptor(x, [tokens, depth], [depth, 1], [height, step])
    ws = tl.make_tensor_descriptor(w, [2, hidden, depth], [hidden * depth, depth, 1], [2, width, step])
    outs = tl.make_tensor_descriptor(out, [tokens, hidden], [hidden, 1], [height, width])
    down = tl.cdiv(tokens, height)
    across: tl.constexpr = (hidden + width - 1) // width
    tiles = down * across
    # All programs take equally many tiles; those left over are halved, if there are enough programs for the halves.
    left = tiles % programs
    if 2 * left > programs:
        left = 0
    for index in tl.range(tl.program_id(0), tiles - left, programs, flatten=True):
        row, column = _place(index, down, across, rows)
        _tile(xs, ws, outs, row * height, column * width, depth, height, width, step)
    half_ws = tl.make_tensor_descriptor(w, [2, hidden, depth], [hidden * depth, depth, 1], [2, half, step])
    half_outs = tl.make_tensor_descriptor(out, [tokens, hidden], [hidden, 1], [height, half])
    for index in tl.range(tl.program_id(0), 2 * left, programs):
        row, column = _place(tiles - left + index // 2, down, across, rows)
        _tile(xs, half_ws, half_outs, row * height, column * width + index % 2 * half, depth, height, half, step)


def suits(x: Tensor, w13: Tensor) -> bool:
    """Whether the kernel supports these inputs and their device."""
    (width, depth), per_16_bytes = w13.shape, 8
    aligned = depth % per_16_bytes == 0 and width % (2 * per_16_bytes) == 0
    return x.dtype is torch.bfloat16 and aligned and is_hopper(x.device)


@triton_op("zserve::swiglu", mutates_args={})
def swiglu(x: Tensor, w13: Tensor) -> Tensor:
    """See `reference.swiglu`. All inputs are contiguous and satisfy `suits`."""
    out = x.new_empty((x.shape[0], w13.shape[0] // 2))
    launch(x, w13, out, torch.cuda.get_device_properties(x.device).multi_processor_count)
    return out


def launch(x: Tensor, w13: Tensor, out: Tensor, programs: int) -> None:
    """Fills `out` with `programs` programs at once."""
    (tokens, depth), hidden = x.shape, out.shape[1]
    wrap_triton(_swiglu)[(programs,)](
        x, w13, out, tokens, depth, hidden, programs, TOKENS, CHANNELS, STEP, ROWS, num_stages=STAGES, num_warps=WARPS
    )
