"""The denoiser for compilers on CUDA: the same weights and results, in fewer and larger pieces.

Projections of the same input are one matrix product, and everything between two products is one kernel
(`export/kernels`). Inductor finds neither by itself. Attention is FlashAttention-3 where available. Each block computes
its products in one of two forms (`export/modules/products.py`): in the type of its weights, or in FP8.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from export.kernels import attention as flash
from export.modules.blocks import Foreign
from export.modules.denoiser import Denoiser
from export.modules.merged import merge_projections
from export.modules.quantized import quantize_projections, quantized_layers
from export.modules.rope import Rotation
from export.spec import Precision

# The parts of a block's modulation, as `export.kernels` numbers them.
SCALE_ATTENTION, GATE_ATTENTION, SCALE_FEED_FORWARD, GATE_FEED_FORWARD = range(4)


def fused(denoiser: Denoiser, precision: Precision) -> Denoiser:
    """`denoiser` with its blocks in fused form, sharing all weights; its projections are merged in place."""
    merge_projections(denoiser)
    other = copy.copy(denoiser)
    other.run_blocks = run_blocks
    if precision is Precision.FP8:
        quantize_projections(denoiser)
        other.run_blocks = partial(run_blocks, quantized=quantized_layers(denoiser))
    return other


def run_blocks(
    layers: Sequence[Foreign], x: Tensor, rotation: Rotation, conditioning: Tensor, quantized: Sequence[Foreign] = ()
) -> Tensor:
    """Does what `export.modules.denoiser.run_blocks` does; a block's end and the next one's start are one kernel.

    The layers in `quantized` compute their products in FP8.
    """
    from export.kernels import triton_kernels as kernels
    from export.modules.products import PlainProducts, QuantizedProducts

    cos, sin = (table[0, :, 0].contiguous() for table in (rotation.cos, rotation.sin))
    modulations = [layer.adaLN_modulation(conditioning) for layer in layers]
    products = [(QuantizedProducts if layer in quantized else PlainProducts)(layer) for layer in layers]
    first = layers[0].attention_norm1
    h: Any = products[0].norm_modulate(x, first.weight, modulations[0], SCALE_ATTENTION, first.eps)
    for number, (layer, modulation, own) in enumerate(zip(layers, modulations, products, strict=True)):
        norm, after = layer.attention_norm2, layer.ffn_norm1
        qkv = own.qkv(h).reshape(*x.shape[:2], 3 * x.shape[2])
        branch = own.attention_output(_attention(layer.attention, qkv, cos, sin))
        x, h = own.gated_residual_norm_modulate(
            x, branch.reshape(x.shape), norm.weight, modulation, GATE_ATTENTION,
            after.weight, modulation, SCALE_FEED_FORWARD, norm.eps,
        )  # fmt: skip
        norm, branch = layer.ffn_norm2, own.feed_forward(h).reshape(x.shape)
        if number + 1 == len(layers):
            x = kernels.gated_residual(x, branch, norm.weight, modulation, GATE_FEED_FORWARD, norm.eps)
            break
        x, h = products[number + 1].gated_residual_norm_modulate(
            x, branch, norm.weight, modulation, GATE_FEED_FORWARD,
            layers[number + 1].attention_norm1.weight, modulations[number + 1], SCALE_ATTENTION, norm.eps,
        )  # fmt: skip
    return x


def _attention(attention: Foreign, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """From the merged projections to the output projection's input: [B, S, 3 * dim] -> [B, S, dim]."""
    from export.kernels import triton_kernels as kernels

    norm_q, norm_k = attention.norm_q, attention.norm_k
    q, k = kernels.norm_rotate(qkv, norm_q.weight, norm_k.weight, cos, sin, norm_q.eps)
    v = qkv.chunk(3, -1)[2].reshape(q.shape)
    if flash.suits(q):
        mixed: Tensor = flash.attention(q, k, v)
    else:
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return mixed.flatten(2)
