"""The sigma schedule and the noise are diffusers' own."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from server.worker.sampler import initial_noise, sigma_schedule, timestep


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 9, 50])
@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_the_schedule_is_that_of_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps))
    assert torch.tensor(sigma_schedule(steps, shift)).equal(scheduler.sigmas)
    assert [timestep(s) for s in sigma_schedule(steps, shift)[:-1]] == ((1000 - scheduler.timesteps) / 1000).tolist()


def test_eight_steps_are_the_nine_of_older_examples() -> None:
    known = [1, 0.95455, 0.9, 0.83333, 0.75, 0.64286, 0.5, 0.3, 0]
    assert sigma_schedule(8, 3.0) == pytest.approx(known, abs=1e-5)


def test_noise_depends_on_the_seed_alone() -> None:
    noise = initial_noise(3, height=128, width=64, channels=16)
    assert noise.shape == (1, 16, 16, 8)
    assert noise.equal(initial_noise(3, height=128, width=64, channels=16))
    assert not noise.equal(initial_noise(4, height=128, width=64, channels=16))
    expected = torch.randn(1, 16, 16, 8, generator=torch.Generator().manual_seed(3))
    assert noise.equal(expected)
