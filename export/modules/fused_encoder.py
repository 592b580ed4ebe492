"""The prompt encoder for compilers on CUDA: the same weights and results, in fewer and larger matrix products.

With a prompt's few tokens, a product takes as long as reading its weights, and small products take longer. Queries and
keys are normalised and rotated by one kernel per layer (`export/kernels`), where Inductor takes six.
"""

import copy
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from export.modules.blocks import Foreign
from export.modules.merged import merge_projections
from export.modules.prompt_encoder import PromptEncoder, run_layer


def fused_encoder(encoder: PromptEncoder) -> PromptEncoder:
    """`encoder` with its layers in fused form, sharing all weights; its projections are merged in place."""
    merge_projections(encoder)
    other = copy.copy(encoder)
    other.run_layers = run_layers
    return other


def run_layers(layers: Iterable[Foreign], hidden: Tensor, positions: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Does what `export.modules.prompt_encoder.run_layers` does."""
    cos, sin = (table.contiguous() for table in rotation)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        if not hasattr(attention, "qkv"):  # not merged: they have biases, unlike those of Z-Image's Qwen3
            hidden = run_layer(layer, hidden, positions, rotation)
            continue
        hidden = hidden + attention.o_proj(_attend(attention, layer.input_layernorm(hidden), cos, sin))
        gate, up = F.linear(layer.post_attention_layernorm(hidden), mlp.gate_up).chunk(2, -1)
        hidden = hidden + mlp.down_proj(mlp.act_fn(gate) * up)
    return hidden


def _attend(attention: Foreign, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`Qwen3Attention.forward` up to the output projection: [B, T, width] -> [B, T, heads * head_dim]."""
    from export.kernels import triton_kernels as kernels

    norm_q, norm_k = attention.q_norm, attention.k_norm
    heads = attention.q_proj.out_features // attention.head_dim
    qkv = F.linear(x, attention.qkv)
    q, k = kernels.norm_rotate_halves(qkv, norm_q.weight, norm_k.weight, cos, sin, heads, norm_q.variance_epsilon)
    v = qkv[..., -k.shape[2] * k.shape[3] :].reshape(k.shape)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(2)
