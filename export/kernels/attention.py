"""Attention by FlashAttention-3 where available: packages call this operator, so serving them needs the library.

On an H100 kept hot it takes 0.43 ms for the published model's 4,160 tokens, cuDNN 0.51 (docs/performance-log.md).
"""

import importlib.util

import torch
from torch import Tensor

from export.kernels.hopper import is_hopper

WIDEST = 256  # head_dim that the library takes


def is_there(device: torch.device) -> bool:
    """Whether FlashAttention-3 is installed and supports `device`."""
    return is_hopper(device) and importlib.util.find_spec("fa3_fwd_interface") is not None


def suits(q: Tensor) -> bool:
    """Whether the library is available and supports queries [B, S, heads, head_dim] like these."""
    return q.dtype is torch.bfloat16 and q.shape[-1] <= WIDEST and is_there(q.device)


@torch.library.custom_op("zserve::attention", mutates_args=(), device_types="cuda")
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`scaled_dot_product_attention` of bf16 [B, S, heads, head_dim], with dimensions in this order."""
    from fa3_fwd_interface import flash_attn_func

    mixed: Tensor = flash_attn_func(q, k, v)
    return mixed


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)
