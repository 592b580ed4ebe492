"""Noise levels: which ones to train on, and the ones that sampling visits."""

import torch
from torch import Tensor

from demo.training.config import DenoiserConfig, Size

SHIFT = 3.0
STEP_COUNTS = (4, 5, 6, 7, 8, 8, 8, 9)  # 8 is what the model is used with


def schedule(steps: int) -> Tensor:
    """The sigmas of a sampling run and the 0 it ends at, float32 [steps + 1]."""
    return torch.cat([_shifted(torch.linspace(1, 1 / steps, steps), SHIFT), torch.zeros(1)])


def sample_sigmas(count: int, size: Size, config: DenoiserConfig, device: torch.device) -> Tensor:
    """Training noise levels, float32 [count].

    Some are the schedules' own, some pure noise; the rest are spread, and nearer to pure noise for larger
    pictures, where the layout is settled at a higher noise level because more pixels average it out.
    """
    visited = torch.cat([schedule(steps)[:-1] for steps in STEP_COUNTS]).to(device)
    on_schedule = visited[torch.randint(len(visited), (count,), device=device)]
    larger = (size[0] * size[1]) ** 0.5 / 256
    spread = _shifted(torch.rand(count, device=device), SHIFT * max(1.0, larger**0.5))
    kind = torch.rand(count, device=device)
    sigmas = torch.where(kind < config.on_schedule, on_schedule, spread)
    return torch.where(kind > 1 - config.pure_noise, torch.ones_like(sigmas), sigmas)


def _shifted(sigmas: Tensor, shift: float) -> Tensor:
    return shift * sigmas / (1 + (shift - 1) * sigmas)
