"""What the denoiser draws in the middle of its training: scores and a sheet."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage

from demo.scenes import Image, Scene, sample_scenes
from demo.score import score
from demo.training.autoencoder import decode
from demo.training.config import Size
from demo.training.forward import denoise
from demo.training.models import CAPTION_STEP, CHANNELS, tokenize
from demo.training.noise import schedule
from demo.training.pools import read_captions

Models = tuple[Any, Any, Any, Any]  # tokenizer, autoencoder, reader, denoiser


def sample(models: Models, scenes: list[Scene], size: Size, steps: int = 8) -> list[Image]:
    """Pictures of the scenes' prompts, without guidance, in the order given."""
    ids, lengths = tokenize(models[0], [scene.prompt for scene in scenes])
    padded = (lengths + CAPTION_STEP - 1) // CAPTION_STEP * CAPTION_STEP
    images: dict[int, Image] = {}
    for length in sorted(set(padded.tolist())):
        chosen = torch.nonzero(padded == length)[:, 0]
        drawn = _sample(models, ids[chosen, :length], lengths[chosen], size, steps)
        images.update(zip(chosen.tolist(), drawn, strict=True))
    return [images[i] for i in range(len(scenes))]


@torch.no_grad()
def _sample(models: Models, ids: torch.Tensor, lengths: torch.Tensor, size: Size, steps: int) -> Any:
    _, autoencoder, reader, denoiser = models
    device = denoiser.x_pad_token.device
    ids, lengths = ids.to(device), lengths.to(device)
    caption = read_captions(reader, ids)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(ids), CHANNELS, size[1] // 8, size[0] // 8, generator=generator).to(device)
    sigmas = schedule(steps)
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        sigma = torch.full((len(ids),), now, device=device)
        latents = latents - (after - now) * denoise(denoiser, latents, sigma, caption, lengths)
    return decode(autoencoder, latents)


def report_samples(models: Models, probes: dict[Size, int], sheet: Path | None = None) -> str:
    """One line: the share of all-correct pictures at each size, of as many as given."""
    told = []
    for size, count in probes.items():
        scenes = sample_scenes(count, 2024)
        images = sample(models, scenes, size)
        scores = [score(image, scene) for image, scene in zip(images, scenes, strict=True)]
        parts = "/".join(f"{np.mean([getattr(s, part) for s in scores]):.2f}" for part in vars(scores[0]))
        told.append(f"{size[0]}x{size[1]} {np.mean([s.all_correct for s in scores]):.3f} ({parts})")
        if sheet and size == (256, 256):
            save_sheet(images[:32], sheet)
    return "  ".join(told)


def save_sheet(images: list[Image], path: Path, columns: int = 8) -> None:
    rows = [np.concatenate(images[i : i + columns], 1) for i in range(0, len(images), columns)]
    PillowImage.fromarray(np.concatenate(rows)).save(path)
