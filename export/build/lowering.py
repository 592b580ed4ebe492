"""What Inductor is given on CUDA in place of operators that it, or PyTorch's kernels for them, handle badly there.

Each takes the operator's own arguments and gives its result. Figures, of the published image decoder at 1024x1024 on
an H200, are in docs/performance-log.md.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram

from export.spec import Component

ATTENTION_CHUNKS = 4  # of the queries: height and width of latents are even, so they divide


def lowered(program: ExportedProgram, component: Component) -> ExportedProgram:
    """`program` of `component` with what is better written otherwise written so."""
    if component is not Component.IMAGE_DECODER:
        return program
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.11 to 2.13 warns of its own use of its LeafSpec
        rewritten: ExportedProgram = program.run_decompositions(dict(IMAGE_DECODER))
    return rewritten


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Group normalisation of `x` [B, C, ...] by sums of channels, which lie side by side in channels-last memory.

    Sums of groups, as ATen has it, read a few bytes of every pixel at a time there.
    """
    wide, pixels = x.float(), tuple(range(2, x.ndim))
    count = x[0, 0].numel() * (x.shape[1] // groups)
    total, squares = (_by_group(sums, groups) for sums in (wide.sum(pixels), wide.square().sum(pixels)))
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0)
    scale = torch.rsqrt(deviation + eps) * weight.float()
    shift = bias.float() - mean * scale
    spread = (*scale.shape, *[1] * len(pixels))
    return (wide * scale.reshape(spread) + shift.reshape(spread)).to(x.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention [B, heads, S, d] as matrix products, for heads too wide for any fast fused kernel (d = 512).

    By a quarter of the queries at a time, so that the scores take a quarter of the memory.
    """
    assert mask is None and not dropout and not is_causal and not enable_gqa, "the image decoder has plain attention"
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    transposed = key.transpose(-1, -2)
    chunks = query.unflatten(-2, (ATTENTION_CHUNKS, -1)).unbind(-3)  # type: ignore[no-untyped-call]
    return torch.cat([torch.softmax(chunk @ transposed, -1) @ value for chunk in chunks], -2)


def upsample_nearest(x: Tensor, size: Sequence[int] | None, factors: Sequence[float] | None) -> Tensor:
    """`x` [B, C, h, w] with every pixel twice in both directions, without arithmetic on positions."""
    assert size is None and factors is not None and list(factors) == [2.0, 2.0], "the image decoder doubles sizes"
    batch, channels, height, width = x.shape
    doubled = x[:, :, :, None, :, None].expand(batch, channels, height, 2, width, 2)
    return doubled.reshape(batch, channels, 2 * height, 2 * width)


def _by_group(sums: Tensor, groups: int) -> Tensor:
    """Of sums by channel [B, C]: of its group, for every channel."""
    batch, channels = sums.shape
    grouped = sums.reshape(batch, groups, -1).sum(-1, keepdim=True)
    return grouped.expand(batch, groups, channels // groups).reshape(batch, channels)


IMAGE_DECODER = {
    torch.ops.aten.group_norm.default: group_norm,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.aten.upsample_nearest2d.vec: upsample_nearest,
}
