"""Projections of the same input as one matrix product each."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from export.modules.blocks import Foreign
from export.modules.denoiser import Denoiser
from export.modules.prompt_encoder import PromptEncoder


def merge_projections(component: Denoiser | PromptEncoder) -> None:
    """Concatenates the weights of projections of the same input into one additional parameter.

    The original parameters become views of it, so nothing is in memory twice, and code that uses them still works. Does
    nothing the second time, and leaves projections with a bias alone.
    """
    for owner, name, parts in _projections(component):
        if _merge(owner, name, parts):
            # What the parts took, over half of the weights in total: torch would keep it from others on the device.
            torch.cuda.empty_cache()


def _projections(component: Denoiser | PromptEncoder) -> Iterator[tuple[Foreign, str, Sequence[str]]]:
    """For each block: the projections' owner, the merged parameter's name, and each projection's name."""
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
    """Merges `parts` into `name`; returns whether there was anything to merge."""
    linears = [getattr(owner, part) for part in parts]
    if hasattr(owner, name) or any(linear.bias is not None for linear in linears):
        return False
    merged = torch.cat([linear.weight for linear in linears])
    owner.register_parameter(name, nn.Parameter(merged, requires_grad=False))
    weights = torch.split(merged, [linear.out_features for linear in linears])
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return True
