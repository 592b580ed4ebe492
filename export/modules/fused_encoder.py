"""The prompt encoder for compilers on CUDA: the same weights and results, in fewer and larger matrix products.

At the few tokens of a prompt a product takes as long as its weights take to be read, and small ones longer.
"""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from export.modules.blocks import Foreign
from export.modules.merged import merge_projections
from export.modules.prompt_encoder import PromptEncoder, run_layer


def fused_encoder(encoder: PromptEncoder) -> PromptEncoder:
    """`encoder` with its layers in fused form; it shares all weights, once `merge_projections` has been here."""
    merge_projections(encoder)
    other = copy.copy(encoder)
    other.run_layers = run_layers
    return other


def run_layers(layers: Iterable[Foreign], hidden: Tensor, positions: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """What `export.modules.prompt_encoder.run_layers` does."""
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        if not hasattr(attention, "qkv"):  # its projections have biases, which those of Z-Image's Qwen3 have not
            hidden = run_layer(layer, hidden, positions, rotation)
            continue
        hidden = hidden + attention.o_proj(_attend(attention, layer.input_layernorm(hidden), rotation))
        gate, up = F.linear(layer.post_attention_layernorm(hidden), mlp.gate_up).chunk(2, -1)
        hidden = hidden + mlp.down_proj(mlp.act_fn(gate) * up)
    return hidden


def _attend(attention: Foreign, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """`Qwen3Attention.forward` up to its output's projection: [B, T, width] -> [B, T, heads * head_dim]."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    heads = [projection.out_features // attention.head_dim for projection in projections]
    qkv = F.linear(x, attention.qkv).reshape(*x.shape[:2], -1, attention.head_dim)
    q, k, v = torch.split(qkv, heads, 2)
    q = _rotated(attention.q_norm(q).transpose(1, 2), *rotation)
    k = _rotated(attention.k_norm(k).transpose(1, 2), *rotation)
    mixed = F.scaled_dot_product_attention(
        q, k, v.transpose(1, 2), is_causal=True, scale=attention.scaling, enable_gqa=True
    )
    return mixed.transpose(1, 2).flatten(2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary_pos_emb` of transformers: `x` [B, heads, T, head_dim], `cos` and `sin` [B, T, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
