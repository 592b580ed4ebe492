"""The Euler flow-match sampler: which noise levels a request visits, and the noise it starts from."""

import functools

import numpy as np
import torch
from torch import Tensor

from export.spec import PIXELS_PER_LATENT


@functools.cache
def sigma_schedule(steps: int, shift: float) -> tuple[float, ...]:
    """The `steps` + 1 noise levels from 1 down to 0, as diffusers >= 0.39 visits them, in fp32.

    u = linspace(1, 1/n, n), sigma = shift * u / (1 + (shift - 1) * u), then 0. Source: `get_default_z_image_sigmas`
    and `FlowMatchEulerDiscreteScheduler.set_timesteps` of diffusers 0.42.
    """
    u = torch.linspace(1.0, 1.0 / steps, steps)
    return (*(shift * u / (1 + (shift - 1) * u)).tolist(), 0.0)


def timestep(sigma: float) -> float:
    """The denoiser's time input at noise level `sigma`: 0 at pure noise, towards 1 at the image.

    Going through thousandths rounds in fp32 exactly as diffusers' pipeline does.
    """
    return float((np.float32(1000) - np.float32(sigma) * np.float32(1000)) / np.float32(1000))


def initial_noise(seed: int, *, height: int, width: int, channels: int) -> Tensor:
    """fp32 [1, channels, height / 8, width / 8] from a CPU generator, so a seed means the same on every device."""
    shape = (1, channels, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def euler_step(latents: Tensor, velocity: Tensor, change: Tensor) -> Tensor:
    """`latents` [B, C, h, w] with each row moved by its own `change` of sigma, fp32 [B]."""
    return latents + change.view(-1, 1, 1, 1) * velocity
