"""Two optimizers as one: orthogonalised momentum for the blocks' matrices, AdamW for everything else."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pushes singular values to about one
UPDATE_RMS = 0.2  # AdamW's usual update, so that both share one learning rate


class Muon:
    """Momentum whose update is made orthogonal, matrices of one shape together."""

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            shapes[matrix.shape].append(matrix)
        self.groups = list(shapes.values())
        self.momenta = [torch.zeros_like(torch.stack([m.data for m in group])) for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalise(gradient.lerp(momentum, MOMENTUM))
            scale = UPDATE_RMS * max(update.shape[1:]) ** 0.5
            torch._foreach_add_(list(group), list(update.to(momentum.dtype).unbind()), alpha=-rate * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices with singular values of about one, bfloat16 [n, rows, columns]."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    result: Tensor = x.mT if tall else x
    return result


class Optimizer:
    """Steps a denoiser and its reader at one learning rate, the reader at a share of it."""

    def __init__(self, denoiser: nn.Module, reader: nn.Module, *, muon: bool) -> None:
        matrices = [p for name, p in denoiser.named_parameters() if muon and _is_block_matrix(name, p)]
        chosen = {id(matrix) for matrix in matrices}
        rest = [p for p in denoiser.parameters() if id(p) not in chosen]
        self.parameters = [*denoiser.parameters(), *reader.parameters()]
        self.muon = Muon(matrices)
        groups = [{"params": rest}, {"params": list(reader.parameters())}]
        fused = next(denoiser.parameters()).is_cuda
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)

    def step(self, rate: float, reader_share: float) -> None:
        """Clip, update and forget the gradients."""
        for group, share in zip(self.adamw.param_groups, (1.0, reader_share), strict=True):
            group["lr"] = rate * share
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.muon.step(rate)
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "momenta": self.muon.momenta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.muon.momenta = state["momenta"]


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and (".attention." in name or ".feed_forward." in name)
