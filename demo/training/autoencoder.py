"""Stage one: the autoencoder learns to keep the pictures."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.training.config import AutoencoderConfig, Size
from demo.training.data import SceneArrays
from demo.training.pictures import draw
from demo.training.progress import Progress

BATCHES_DRAWN = 8


def train_autoencoder(autoencoder: Any, scenes: SceneArrays, config: AutoencoderConfig, device: torch.device) -> None:
    """Train in place, then fix the latents' shift and scale in its configuration."""
    autoencoder.to(device).requires_grad_(True)
    with _compiled(autoencoder, enabled=device.type == "cuda"):
        _train(autoencoder, Pictures(scenes, config, device), Progress.of("autoencoder", config))
    _fix_scale(autoencoder, scenes, device)


def sharpen_decoder(autoencoder: Any, scenes: SceneArrays, config: AutoencoderConfig, device: torch.device) -> None:
    """Train the decoder alone: the latents that the denoiser has learnt stay what they are."""
    autoencoder.to(device).requires_grad_(False)
    autoencoder.decoder.requires_grad_(True)
    _train(autoencoder, Pictures(scenes, config, device), Progress.of("decoder", config))


def _train(autoencoder: Any, pictures: "Pictures", progress: Progress) -> None:
    autoencoder.train()
    trained = [parameter for parameter in autoencoder.parameters() if parameter.requires_grad]
    fused = pictures.device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), fused=fused)
    while progress.share < 1:
        loss = _step(autoencoder, optimizer, pictures.batch(), progress, pictures.config)
        if progress.step % 250 == 0:
            progress.report(loss=loss.item())
    autoencoder.eval().requires_grad_(False)
    sizes = ((256, 256), (1024, 1024)) if fused else ((256, 256),)
    with torch.compiler.set_stance("force_eager"):  # compiling for two batches of pictures took over a minute
        psnr = {f"psnr_{w}": _psnr(autoencoder, pictures.scenes, (w, h), pictures.device) for w, h in sizes}
    progress.report(**psnr)


def _step(autoencoder: Any, optimizer: Any, pictures: Tensor, progress: Progress, config: AutoencoderConfig) -> Tensor:
    rise = min(1, (progress.step + 1) / 100)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * rise * (0.5 + 0.5 * math.cos(math.pi * progress.share))
    usual = tuple(pictures.shape[:1:-1]) == config.sizes[0]
    with torch.compiler.set_stance("default" if usual else "force_eager"):
        loss = _loss(autoencoder, pictures, config)
        torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    progress.step += 1
    return loss.detach()


@contextmanager
def _compiled(autoencoder: Any, *, enabled: bool) -> Iterator[None]:
    """Both halves compiled for the first of the sizes; the others run as they are."""
    halves = [autoencoder.encoder, autoencoder.decoder] if enabled else []
    for half in halves:
        half.compile()
    yield
    for half in halves:
        half._compiled_call_impl = None


def encode(autoencoder: Any, scenes: SceneArrays, size: Size, device: torch.device) -> Tensor:
    """Latents of the scenes' true pictures as the denoiser sees them, float16 [n, 16, h/8, w/8]."""
    batch = max(1, 2**22 // (size[0] * size[1]))
    shift, scale = autoencoder.config.shift_factor or 0.0, autoencoder.config.scaling_factor
    parts = []
    for start in range(0, len(scenes), batch):
        pictures = draw(scenes.part(np.arange(start, min(start + batch, len(scenes)))), size, device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latents = autoencoder.encode(pictures).latent_dist.mean
        parts.append(((latents.float() - shift) * scale).half())
    return torch.cat(parts).contiguous()


def decode(autoencoder: Any, latents: Tensor) -> np.ndarray:
    """Pictures of the denoiser's latents, uint8 [n, H, W, 3]."""
    latents = latents / autoencoder.config.scaling_factor + (autoencoder.config.shift_factor or 0.0)
    with torch.no_grad(), torch.autocast(latents.device.type, torch.bfloat16):
        pictures = torch.cat([autoencoder.decode(part, return_dict=False)[0] for part in torch.split(latents, 16)])
    shown = (pictures.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
    return np.asarray(shown.permute(0, 2, 3, 1).cpu().numpy())


class Pictures:
    """Batches of pictures of the configured sizes, drawn several batches at a time."""

    def __init__(self, scenes: SceneArrays, config: AutoencoderConfig, device: torch.device) -> None:
        self.scenes, self.config, self.device = scenes, config, device
        self.rng = random.Random(0)
        self.drawn: dict[Size, list[Tensor]] = {}

    def batch(self) -> Tensor:
        """Pictures of one size, float32 [n, 3, H, W]."""
        size = self.rng.choices(self.config.sizes, self.config.weights)[0]
        if not self.drawn.get(size):
            self.drawn[size] = self._draw(size)
        return self.drawn[size].pop()

    def _draw(self, size: Size) -> list[Tensor]:
        count = max(2, self.config.pixels // (size[0] * size[1]))
        chosen = np.array([self.rng.randrange(len(self.scenes)) for _ in range(count * BATCHES_DRAWN)])
        return list(torch.split(draw(self.scenes.part(chosen), size, self.device), count))


def _loss(autoencoder: Any, pictures: Tensor, config: AutoencoderConfig) -> Tensor:
    with torch.autocast(pictures.device.type, torch.bfloat16):
        mean = autoencoder.encode(pictures).latent_dist.mean
        noisy = mean + torch.randn_like(mean) * config.latent_noise
        again = autoencoder.decode(noisy, return_dict=False)[0].float()
    off = again - pictures
    penalty = config.latent_penalty * mean.float().square().mean()
    loss: Tensor = off.abs().mean() + 0.5 * off.square().mean() + penalty
    return loss


def _fix_scale(autoencoder: Any, scenes: SceneArrays, device: torch.device) -> None:
    autoencoder.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    latents = encode(autoencoder, scenes.part(np.arange(min(64, len(scenes)))), (256, 256), device).float()
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


def _psnr(autoencoder: Any, scenes: SceneArrays, size: Size, device: torch.device) -> float:
    """In dB, of all scenes as one picture and before rounding; that of pictures is above, in `verify.distance`."""
    part = scenes.part(np.arange(min(32, len(scenes))))
    truth = (draw(part, size, device).permute(0, 2, 3, 1) * 127.5 + 127.5).cpu().numpy()
    again = decode(autoencoder, encode(autoencoder, part, size, device).float())
    return float(-10 * np.log10(np.mean((truth - again) ** 2) / 255**2))
