"""Whole images from engines and from eager, for the same prompts and noise, and how far they are apart."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from demo.scenes import Scene, sample_scenes
from demo.score import score
from export.checkpoint import open_checkpoint
from export.errors import CheckpointError
from export.manifest import Manifest
from server.requests import GenerationRequest, ImageFormat, LongPrompt
from server.worker.executor import Components, Executor, ImageSequence, make_sequences
from server.worker.prompts import PromptTokenizer

STEPS = 8
PROMPTS = (
    "A red fox sitting in fresh snow at sunrise, photograph",
    "一只红色的茶壶放在木桌上，旁边是一本打开的书",
    "A watercolour of a lighthouse on a cliff, gulls above the sea",
)
DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo" / "checkpoint"

KEPT_PROMPTS = 256
Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # width and height in pixels
T = TypeVar("T")


@dataclass(frozen=True)
class ImageParity:
    """Engines against eager over all prompts; the score is the share of demo images that show what was asked for."""

    images: int
    worst_psnr: float  # dB; infinite where all are equal
    largest_difference: int  # grey levels
    score: float | None = None
    eager_score: float | None = None


def draw(manifest: Manifest, components: Components, device: torch.device, count: int) -> list[Pixels]:
    """`count` images at the default size, always the same prompts and noise."""
    scenes = _scenes(manifest, count)
    prompts = [s.prompt for s in scenes] if scenes else [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    width, height = map(int, manifest.default_size.split("x"))
    return Painter(manifest, components, str(device)).draw(prompts, (width, height))


def compare_images(manifest: Manifest, compiled: list[Pixels], expected: list[Pixels]) -> ImageParity:
    """The images that `draw` made with engines and with eager."""
    scenes = _scenes(manifest, len(compiled))
    pairs = list(zip(compiled, expected, strict=True))
    return ImageParity(
        images=len(compiled),
        worst_psnr=min(psnr(a, b) for a, b in pairs),
        largest_difference=max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs),
        score=None if scenes is None else share_correct(compiled, scenes),
        eager_score=None if scenes is None else share_correct(expected, scenes),
    )


def _scenes(manifest: Manifest, count: int) -> list[Scene] | None:
    """What the demo is asked for; None for other models, whose images cannot be scored."""
    return list(sample_scenes(count, seed=1)) if is_demo(manifest) else None


class Painter:
    """The server's image path without the server: encode -> denoise -> decode, with its prompt cache."""

    def __init__(self, manifest: Manifest, components: Components, device: str) -> None:
        self._executor = Executor(components, manifest, device, KEPT_PROMPTS)
        self._tokenizer = PromptTokenizer(Path(manifest.checkpoint.path))
        self._shift = manifest.checkpoint.shift
        self.encoded = 0  # prompts that were not in the cache

    def draw(self, prompts: Sequence[str], size: Size, *, steps: int | None = None, at_once: int = 1) -> list[Pixels]:
        """Image i from seed i, uint8 [H, W, 3]; up to `at_once` of one shape share a step."""
        sequences = [self._sequence(prompt, seed, size, steps or STEPS) for seed, prompt in enumerate(prompts)]
        alike = sorted(sequences, key=lambda s: s.shape.captions)
        for _, group in groupby(alike, key=lambda s: s.shape):
            for batch in batched(group, at_once):
                self._denoise(batch)
        return [self._executor.decode(sequence).result() for sequence in sequences]

    def forget(self) -> None:
        """Empties the prompt cache."""
        self._executor.free_memory()

    def problem(self) -> str:
        """Why an engine is not the one that was loaded; empty if all are."""
        return "; ".join(use.fallback_reason for use in self._executor.engines() if use.fallback_reason)

    def _sequence(self, prompt: str, seed: int, size: Size, steps: int) -> ImageSequence:
        request = GenerationRequest(
            request_id="", model="", prompt=prompt, negative_prompt="", width=size[0], height=size[1],
            num_inference_steps=steps, guidance_scale=0.0, seed=seed, num_images=1, image_format=ImageFormat.RAW,
            quality=0, preview_interval=0, priority=1, long_prompt=LongPrompt.REFUSE, timeout=None,
        )  # fmt: skip
        ids = self._tokenizer.encode("prompt", prompt, LongPrompt.REFUSE)
        (sequence,) = make_sequences(request, (ids,), key=seed, shift=self._shift, now=0.0)
        self._executor.encode(sequence).result()
        self.encoded += not sequence.prompt_cached
        return sequence

    def _denoise(self, batch: Sequence[ImageSequence]) -> None:
        for _ in range(batch[0].steps):
            self._executor.denoise(batch)
            for sequence in batch:
                sequence.step += 1


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """`items` in tuples of `size`, the last one maybe shorter."""
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal to noise ratio in dB."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def share_correct(images: list[Pixels], scenes: list[Scene]) -> float:
    """How many of the demo's images show all that was asked for."""
    return sum(score(image, scene).all_correct for image, scene in zip(images, scenes, strict=True)) / len(images)


def is_demo(manifest: Manifest) -> bool:
    """Whether the version was exported from the demo checkpoint, whose images can be scored."""
    try:
        return manifest.checkpoint.fingerprint == open_checkpoint(DEMO_CHECKPOINT).fingerprint
    except CheckpointError:
        return False
