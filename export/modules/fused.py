"""The denoiser for compilers on CUDA: the same weights and results, in fewer and larger pieces.

Projections of the same input are one matrix product, and what lies between two products is one kernel
(`export/kernels`). Inductor finds neither by itself.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.modules.blocks import Foreign
from export.modules.denoiser import Denoiser
from export.modules.rope import Rotation

# The parts of a block's modulation, as `export.kernels` counts them.
SCALE_ATTENTION, GATE_ATTENTION, SCALE_FEED_FORWARD, GATE_FEED_FORWARD = range(4)


def fused(denoiser: Denoiser) -> Denoiser:
    """`denoiser` with its blocks in fused form; it shares all weights, once `merge_projections` has been here."""
    merge_projections(denoiser)
    other = copy.copy(denoiser)
    other.run_blocks = run_blocks
    return other


def merge_projections(denoiser: Denoiser) -> None:
    """Lays the weights of projections of the same input behind one another, as one parameter more.

    The parameters that there were become views of it, so nothing is in memory twice, and whatever computes with them
    still does. Does nothing the second time.
    """
    for block in (*denoiser.noise_refiner, *denoiser.layers):
        _merge(block.attention, "qkv", ("to_q", "to_k", "to_v"))
        _merge(block.feed_forward, "w13", ("w1", "w3"))


def run_blocks(layers: Sequence[Foreign], x: Tensor, rotation: Rotation, conditioning: Tensor) -> Tensor:
    """What `export.modules.denoiser.run_blocks` does. What ends a block and begins the next is one kernel."""
    from export.kernels import triton_kernels as kernels

    cos, sin = (table[0, :, 0].contiguous() for table in (rotation.cos, rotation.sin))
    modulations = [layer.adaLN_modulation(conditioning) for layer in layers]
    first = layers[0].attention_norm1
    h = kernels.norm_modulate(x, first.weight, modulations[0], SCALE_ATTENTION, first.eps)
    for number, (layer, modulation) in enumerate(zip(layers, modulations, strict=True)):
        norm, after = layer.attention_norm2, layer.ffn_norm1
        branch = _attention(layer.attention, h, cos, sin)
        x, h = kernels.gated_residual_norm_modulate(
            x, branch, norm.weight, modulation, GATE_ATTENTION,
            after.weight, modulation, SCALE_FEED_FORWARD, norm.eps,
        )  # fmt: skip
        norm, branch = layer.ffn_norm2, _feed_forward(layer.feed_forward, h)
        if number + 1 == len(layers):
            x = kernels.gated_residual(x, branch, norm.weight, modulation, GATE_FEED_FORWARD, norm.eps)
            break
        x, h = kernels.gated_residual_norm_modulate(
            x, branch, norm.weight, modulation, GATE_FEED_FORWARD,
            layers[number + 1].attention_norm1.weight, modulations[number + 1], SCALE_ATTENTION, norm.eps,
        )  # fmt: skip
    return x


def _attention(attention: Foreign, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from export.kernels import triton_kernels as kernels

    qkv = F.linear(h, attention.qkv)
    norm_q, norm_k = attention.norm_q, attention.norm_k
    q, k = kernels.norm_rotate(qkv, norm_q.weight, norm_k.weight, cos, sin, norm_q.eps)
    v = qkv.chunk(3, -1)[2].reshape(q.shape)
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    output: Tensor = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
    return output


def _feed_forward(feed_forward: Foreign, h: Tensor) -> Tensor:
    # All samples' tokens as one list: where the batch is dynamic, Inductor would copy what goes into w2 to make it so.
    gate, value = F.linear(h.flatten(0, 1), feed_forward.w13).chunk(2, -1)
    output: Tensor = feed_forward.w2(F.silu(gate) * value)
    return output.reshape(h.shape)


def _merge(owner: nn.Module, name: str, parts: Sequence[str]) -> None:
    if hasattr(owner, name):
        return
    linears = [getattr(owner, part) for part in parts]
    assert all(linear.bias is None for linear in linears), "Z-Image's projections have no bias"
    merged = torch.cat([linear.weight for linear in linears])
    owner.register_parameter(name, nn.Parameter(merged, requires_grad=False))
    weights = torch.split(merged, [linear.out_features for linear in linears])
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)
