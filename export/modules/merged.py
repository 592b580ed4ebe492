"""The denoiser's projections of the same input as one matrix product each."""

from collections.abc import Sequence

import torch
from torch import nn

from export.modules.denoiser import Denoiser


def merge_projections(denoiser: Denoiser) -> None:
    """Lays the weights of projections of the same input behind one another, as one parameter more.

    The parameters that there were become views of it, so nothing is in memory twice, and whatever computes with them
    still does. Does nothing the second time.
    """
    for block in (*denoiser.noise_refiner, *denoiser.layers):
        _merge(block.attention, "qkv", ("to_q", "to_k", "to_v"))
        _merge(block.feed_forward, "w13", ("w1", "w3"))


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
