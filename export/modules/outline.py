"""The components without their weights, for graphs of models that would not fit into memory.

Parameters are fake tensors: shapes and types that torch.export can trace, without data. The small tables that
a graph holds as constants are real.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from export.modules.blocks import Foreign
from export.modules.image_decoder import ImageDecoder, attend_in_slices
from export.modules.load import PARTS, TORCH_DTYPES, build_component
from export.spec import Component, Precision


@dataclass(frozen=True)
class Outline:
    """A component whose parameters are fake; `sources` says which tensor of which checkpoint folder each stands for."""

    module: nn.Module
    mode: FakeTensorMode
    sources: dict[str, tuple[str, str]]


def outline_component(checkpoint: Path, component: Component, precision: Precision) -> Outline:
    """`component` of the checkpoint, from its config files alone."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, default_dtype(TORCH_DTYPES[precision]):
        parts = {name: _outline_part(checkpoint, name) for name in PARTS[component]}
    if "text_encoder" in parts:
        # Its rotary frequencies are computed, not stored, so they must be made outside fake mode.
        rotary: Any = parts["text_encoder"].rotary_emb
        parts["text_encoder"].rotary_emb = type(rotary)(parts["text_encoder"].config)
    module = build_component(component, parts).eval().requires_grad_(False)
    if isinstance(module, ImageDecoder):
        attend_in_slices(module)
    owners = {id(p): (part, name) for part, m in parts.items() for name, p in m.named_parameters()}
    return Outline(module, mode, {name: owners[id(p)] for name, p in module.named_parameters()})


def _outline_part(checkpoint: Path, name: str) -> nn.Module:
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import AutoConfig, AutoModel

    folder = checkpoint / name
    part: nn.Module
    match name:
        case "transformer":
            part = ZImageTransformer2DModel.from_config(ZImageTransformer2DModel.load_config(folder))
        case "text_encoder":
            encoder: Foreign = AutoModel.from_config(
                AutoConfig.from_pretrained(folder), dtype=torch.get_default_dtype()
            )
            encoder.set_attn_implementation("sdpa")  # as `load` does
            part = encoder
        case _:
            part = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    return part


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Creates parameters in `dtype`: fake ones cannot be converted, and real ones would be in memory twice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
