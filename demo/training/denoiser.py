"""Stage three: the denoiser learns to draw, and the text encoder goes on learning with it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo.training.config import DenoiserConfig, Phase, Size
from demo.training.forward import denoise
from demo.training.models import read
from demo.training.noise import sample_sigmas
from demo.training.optimizer import Optimizer
from demo.training.pools import Batch, Pools
from demo.training.progress import Progress

REPORT_EVERY = 500


class DenoiserTraining:
    """The stage's whole state: models, averaged weights, optimizer and how far it is."""

    def __init__(self, denoiser: Any, reader: Any, config: DenoiserConfig) -> None:
        self.denoiser, self.reader, self.config = denoiser, reader, config
        self.optimizer = Optimizer(denoiser, reader, muon=config.muon)
        self.parameters = [*denoiser.parameters(), *reader.parameters()]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.progress = Progress.of("denoiser", config)
        self.rng = random.Random(1)
        self.passed = 0  # milestones

    def run(self, pools: Pools, at_milestone: Callable[["DenoiserTraining"], None]) -> None:
        """Train to the end, calling `at_milestone` at each of them and once more when done."""
        while self.progress.share < 1:
            if pools.features is None and self.progress.share >= self.config.reader_until:
                pools.remember_captions(self.reader)
            size = pick_size(self.config.phases, self.progress.share, self.rng)
            loss = self.step(pools.batch(size, self.config.tokens, self.config.empty_prompts), size)
            if self.progress.step % REPORT_EVERY == 0:
                self.progress.report(loss=loss.item(), width=size[0], height=size[1])
            due = sum(share <= self.progress.share for share in self.config.milestones)
            if due > self.passed:
                self.passed = due
                at_milestone(self)
        at_milestone(self)

    def step(self, batch: Batch, size: Size) -> Tensor:
        """One optimizer step; returns its loss."""
        device = batch.latents.device
        sigma = sample_sigmas(len(batch.latents), size, self.config, device)
        noise = torch.randn_like(batch.latents)
        level = sigma[:, None, None, None]
        noisy = (1 - level) * batch.latents + level * noise
        output = denoise(self.denoiser, noisy, sigma, self._caption(batch), batch.lengths)
        loss = (output - (batch.latents - noise)).square().mean()
        torch.autograd.backward(loss)
        self.optimizer.step(self.rate(), self.reader_share())
        self.progress.step += 1
        self._average()
        return loss.detach()

    def rate(self) -> float:
        """The learning rate: a short rise, a plateau, a straight fall."""
        rise = min(1.0, (self.progress.step + 1) / self.config.warmup_steps)
        fall = min(1.0, max(0.01, (1 - self.progress.share) / (1 - self.config.decay_from)))
        return self.config.learning_rate * rise * fall

    def reader_share(self) -> float:
        """The text encoder's share of the learning rate, falling to nothing where it stops learning."""
        return self.config.reader_rate * max(0.0, 1 - self.progress.share / self.config.reader_until)

    def _caption(self, batch: Batch) -> Tensor:
        if batch.features is not None:
            return batch.features
        with torch.autocast(batch.ids.device.type, torch.bfloat16):
            return read(self.reader, batch.ids).bfloat16()

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(self.config.ema, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(self.average, [parameter.data for parameter in self.parameters], 1 - keep)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the weights with their average: once to use it, once more to go on training."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def save(self, path: Path) -> None:
        state = {
            "denoiser": self.denoiser.state_dict(),
            "reader": self.reader.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "spent": (self.progress.step, self.progress.seconds),
            "passed": self.passed,
            "random": (self.rng.getstate(), torch.get_rng_state()),
        }
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.average[0].device, weights_only=False)
        self.denoiser.load_state_dict(state["denoiser"])
        self.reader.load_state_dict(state["reader"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress("denoiser", self.config.steps, self.config.limit_seconds, state["spent"])
        self.passed = state["passed"]
        self.rng.setstate(state["random"][0])
        torch.set_rng_state(state["random"][1].cpu())


def pick_size(phases: tuple[Phase, ...], share: float, rng: random.Random) -> Size:
    phase = next((phase for phase in phases if share < phase.until), phases[-1])
    return rng.choices(phase.sizes, phase.weights)[0]
