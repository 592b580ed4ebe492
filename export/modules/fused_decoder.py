"""The image decoder for compilers on CUDA: the same weights and results, with less computation and memory traffic.

Feature maps stay in channels-last memory, as cuDNN's convolutions want them; the sums that a group normalisation needs
are accumulated as a map is written (`export/kernels/group_norm.py`); and a convolution of an upsampled map runs before
the upsampling. Inductor finds none of these by itself.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from export.modules.blocks import Foreign
from export.modules.image_decoder import ImageDecoder, sliced_attention


@dataclass(frozen=True)
class FeatureMap:
    """`rows` [h * w, C], and `sums` as `export.kernels.reference.channel_sums` returns them."""

    rows: Tensor
    sums: Tensor
    size: tuple[int, int]  # height, width


def fused_decoder(decoder: ImageDecoder) -> ImageDecoder:
    """`decoder` in fused form, sharing its weights; takes one image per call."""
    other = copy.copy(decoder)
    other.run_decoder = run_decoder
    return other


def run_decoder(decoder: Foreign, z: Tensor) -> Tensor:
    """Does what `export.modules.image_decoder.run_decoder` does."""
    x, middle = _summed(decoder.conv_in(z)), decoder.mid_block
    x = _residual(middle.resnets[0], x)
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        x = _residual(resnet, x if attention is None else _attend(attention, x))
    for block in decoder.up_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            x = _residual(resnet, x)
            x = x if attention is None else _attend(attention, x)
        for upsampler in block.upsamplers or ():
            x = _doubled(upsampler.conv, x)
    h = F.silu(_normalised(decoder.conv_norm_out, x)).to(z.dtype)
    image: Tensor = decoder.conv_out(_image(h, x.size))
    return image


def _residual(resnet: Foreign, x: FeatureMap) -> FeatureMap:
    """`ResnetBlock2D.forward`; each convolution's bias is added by the kernel after it."""
    from export.kernels import group_norm as kernels

    h = resnet.nonlinearity(_normalised(resnet.norm1, x)).to(x.rows.dtype)
    h = _convolved(resnet.conv1, h, x.size)
    middle = FeatureMap(h, kernels.channel_sums(h), x.size)
    h = resnet.nonlinearity(_normalised(resnet.norm2, middle, resnet.conv1.bias)).to(x.rows.dtype)
    h = _convolved(resnet.conv2, h, x.size)
    shortcut, bias = x.rows, resnet.conv2.bias
    if resnet.conv_shortcut is not None:
        shortcut = F.linear(shortcut, resnet.conv_shortcut.weight.flatten(1))
        bias = bias + resnet.conv_shortcut.bias
    rows, sums = kernels.add(shortcut, h, bias)
    return FeatureMap(rows, sums, x.size)


def _attend(attention: Foreign, x: FeatureMap) -> FeatureMap:
    """`AttnProcessor2_0` of diffusers, for a single head."""
    from export.kernels import group_norm as kernels

    h = _normalised(attention.group_norm, x).to(x.rows.dtype)
    mixed = sliced_attention(attention.to_q(h), attention.to_k(h), attention.to_v(h))
    output = attention.to_out[0]
    rows, sums = kernels.add(x.rows, F.linear(mixed, output.weight), output.bias)
    return FeatureMap(rows, sums, x.size)


def _doubled(conv: Foreign, x: FeatureMap) -> FeatureMap:
    """`Upsample2D.forward`: every pixel repeated in both directions, then the 3x3 convolution `conv`.

    Of the nine weights applied around an upsampled pixel, those that meet copies of the same source pixel are summed,
    which leaves four: a 2x2 convolution for each of the four pixels that one source pixel becomes. That is 4/9 of the
    multiplications, and the upsampled map is written once. Source: polyphase decomposition, as in Shi et al., Is the
    deconvolution layer the same as a convolutional layer?, 2016.
    """
    from export.kernels import group_norm as kernels

    weight = conv.weight
    folded = _folded(_folded(weight.float(), 2), 4).to(weight.dtype)  # [C', C, phase, tap, phase, tap]
    phases = F.conv2d(_image(x.rows, x.size), folded.permute(2, 4, 0, 1, 3, 5).flatten(0, 2), padding=1)
    rows, sums = kernels.interleave(phases[0].permute(1, 2, 0).contiguous(), conv.bias)
    height, width = x.size
    return FeatureMap(rows, sums, (2 * height, 2 * width))


def _folded(weight: Tensor, dim: int) -> Tensor:
    """Three taps at `dim` as two phases of two taps, at `dim` and `dim + 1`."""
    before, here, after = weight.unbind(dim)
    first = torch.stack([before, here + after], dim)
    second = torch.stack([before + here, after], dim)
    return torch.stack([first, second], dim)


def _normalised(norm: Foreign, x: FeatureMap, offset: Tensor | None = None) -> Tensor:
    """`norm` of a map, fp32 [h * w, C]; `offset` [C] has yet to be added to its pixels."""
    from export.kernels import group_norm as kernels

    moved = torch.zeros_like(norm.bias) if offset is None else offset
    scale, shift = kernels.affine(x.sums, x.rows.shape[0], norm.num_groups, norm.weight, norm.bias, moved, norm.eps)
    normalised: Tensor = x.rows.float() * scale + shift
    return normalised


def _summed(image: Tensor) -> FeatureMap:
    from export.kernels import group_norm as kernels

    rows = _rows(image)
    return FeatureMap(rows, kernels.channel_sums(rows), (image.shape[2], image.shape[3]))


def _convolved(conv: Foreign, rows: Tensor, size: tuple[int, int]) -> Tensor:
    """`conv` of a map, without the bias, [h * w, C']."""
    return _rows(F.conv2d(_image(rows, size), conv.weight, padding=conv.padding))


def _image(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """A map as convolutions take it, [1, C, h, w], without a copy."""
    return rows.view(1, *size, -1).permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    """[1, C, h, w] as [h * w, C]; without a copy if in channels-last memory."""
    return image[0].permute(1, 2, 0).flatten(0, 1).contiguous()
