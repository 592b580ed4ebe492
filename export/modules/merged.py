"""Projections of the same input as one matrix product each."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from export.modules.blocks import Foreign
from export.modules.denoiser import Denoiser
from export.modules.prompt_encoder import PromptEncoder


def merge_projections(component: Denoiser | PromptEncoder) -> None:
    """Lays the weights of projections of the same input behind one another, as one parameter more.

    The parameters that there were become views of it, so nothing is in memory twice, and whatever computes with them
    still does. Does nothing the second time, and leaves projections with a bias alone.
    """
    for owner, name, parts in _projections(component):
        if _merge(owner, name, parts):
            # What the parts took: in all more than half of the weights, which torch would keep from others there.
            torch.cuda.empty_cache()


def _projections(component: Denoiser | PromptEncoder) -> Iterator[tuple[Foreign, str, Sequence[str]]]:
    """Of each block, what has the projections, and the names of theirs in one and of each."""
    match component:
        case Denoiser():
            for block in (*component.noise_refiner, *component.layers):
                yield block.attention, "qkv", ("to_q", "to_k", "to_v")
                yield block.feed_forward, "w13", ("w1", "w3")
        case PromptEncoder():
            for layer in component.layers:
                yield layer.self_attn, "qkv", ("q_proj", "k_proj", "v_proj")
                yield layer.mlp, "gate_up", ("gate_proj", "up_proj")


def _merge(owner: Foreign, name: str, parts: Sequence[str]) -> bool:
    """Whether there was anything to merge."""
    linears = [getattr(owner, part) for part in parts]
    if hasattr(owner, name) or any(linear.bias is not None for linear in linears):
        return False
    merged = torch.cat([linear.weight for linear in linears])
    owner.register_parameter(name, nn.Parameter(merged, requires_grad=False))
    weights = torch.split(merged, [linear.out_features for linear in linears])
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return True
