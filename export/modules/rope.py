"""Rotary position embedding over three axes (caption position, row, column), in real arithmetic.

diffusers multiplies complex numbers, which neither ONNX nor Inductor can express; the tables and the rotation here
give the same bits (float64 angles, float32 tables, float32 rotation). Source: `RopeEmbedder.precompute_freqs_cis` and
`ZSingleStreamAttnProcessor.apply_rotary_emb` of diffusers 0.42.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Rotation:
    """How far each token is rotated: `cos` and `sin`, fp32, each [B, S, 1, head_dim / 2]."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates the interleaved pairs of `x` [B, S, heads, head_dim] in fp32; returns x's own dtype."""
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
        turned = (a * self.cos - b * self.sin, a * self.sin + b * self.cos)
        return torch.stack(turned, -1).flatten(-2).type_as(x)

    def followed_by(self, other: "Rotation") -> "Rotation":
        """The rotation of this one's tokens, followed by the other's."""
        return type(self)(torch.cat([self.cos, other.cos], 1), torch.cat([self.sin, other.sin], 1))


class OnnxRotation(Rotation):
    """The same as one ONNX operator, for runtimes that run it as one kernel instead of ten small ones."""

    def rotate(self, x: Tensor) -> Tensor:
        """See `Rotation`."""
        cos, sin = (table.squeeze(2).expand(x.shape[0], -1, -1) for table in (self.cos, self.sin))
        rotated: Tensor = torch.onnx.ops.rotary_embedding(x.transpose(1, 2), cos, sin, interleaved=True)
        return rotated.transpose(1, 2)


class RotaryTables(nn.Module):
    """cos and sin of every position of every axis, as one table [length, 2 * pairs] per axis."""

    def __init__(self, axes_dims: Sequence[int], axes_lens: Sequence[int], theta: float) -> None:
        super().__init__()
        self.axes = len(axes_dims)
        self.kind = Rotation
        for axis, (dim, length) in enumerate(zip(axes_dims, axes_lens, strict=True)):
            self.register_buffer(f"table{axis}", _table(dim, length, theta), persistent=False)

    def forward(self, positions: Sequence[Tensor]) -> Rotation:
        """`positions`: one int64 tensor [B, S] per axis."""
        rows = [F.embedding(p, getattr(self, f"table{axis}")) for axis, p in enumerate(positions)]
        cos, sin = zip(*(row.chunk(2, dim=-1) for row in rows), strict=True)
        return self.kind(torch.cat(cos, -1).unsqueeze(2), torch.cat(sin, -1).unsqueeze(2))


def _table(dim: int, length: int, theta: float) -> Tensor:
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies).float()
    unit = torch.polar(torch.ones_like(angles), angles)
    return torch.cat([unit.real, unit.imag], -1).contiguous()


def with_onnx_rotation(module: nn.Module) -> nn.Module:
    """A shallow copy of a component that rotates with ONNX's operator, if it rotates at all; shares the weights."""
    plain = getattr(module, "rope", None)
    if not isinstance(plain, RotaryTables):
        return module
    other, tables = copy.copy(module), copy.copy(plain)
    tables.kind = OnnxRotation
    other._modules = {**module._modules, "rope": tables}
    return other
