"""Whole images from engines and from eager, for the same prompts and noise, and how far they are apart."""

from dataclasses import dataclass
from pathlib import Path

from demo.scenes import Scene, sample_scenes
from demo.score import score
from export.checkpoint import open_checkpoint
from export.errors import CheckpointError
from export.manifest import Manifest
from server.worker.executor import Components
from server.worker.images import Pixels
from verify.distance import largest_difference, worst_psnr
from verify.painter import Painted, Painter

STEPS = 8
LARGEST_LOSS = 0.1  # share of the images: rounding may tip one that eager drew on the edge of what counts as right
PROMPTS = (
    "A red fox sitting in fresh snow at sunrise, photograph",
    "一只红色的茶壶放在木桌上，旁边是一本打开的书",
    "A watercolour of a lighthouse on a cliff, gulls above the sea",
)
DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo" / "checkpoint"


@dataclass(frozen=True)
class ImageParity:
    """Engines against eager over all prompts; the score is the share of demo images that show what was asked for."""

    images: int
    worst_psnr: float | None  # dB; None where all are equal
    largest_difference: int  # grey levels
    score: float | None = None
    eager_score: float | None = None

    def within(self, least_psnr: float) -> bool:
        """Whether the images are as close to eager's as they must be, and about as many show what was asked for."""
        close = self.worst_psnr is None or self.worst_psnr >= least_psnr
        if self.score is None or self.eager_score is None:
            return close
        lost = round((self.eager_score - self.score) * self.images)
        return close and lost <= LARGEST_LOSS * self.images


def draw(manifest: Manifest, components: Components, device: str, count: int) -> Painted:
    """`count` images at the default size, always the same prompts and noise."""
    scenes = _scenes(manifest, count)
    prompts = [s.prompt for s in scenes] if scenes else [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    return Painter(manifest, components, device).draw(prompts, manifest.default_pixels, steps=STEPS)


def compare_images(manifest: Manifest, compiled: list[Pixels], expected: list[Pixels]) -> ImageParity:
    """Compares the images that `draw` made with engines and with eager."""
    scenes = _scenes(manifest, len(compiled))
    return ImageParity(
        images=len(compiled),
        worst_psnr=worst_psnr(compiled, expected),
        largest_difference=largest_difference(compiled, expected),
        score=None if scenes is None else share_correct(compiled, scenes),
        eager_score=None if scenes is None else share_correct(expected, scenes),
    )


def _scenes(manifest: Manifest, count: int) -> list[Scene] | None:
    """What the demo is asked for; None for other models, whose images cannot be scored."""
    return list(sample_scenes(count, seed=1)) if is_demo(manifest) else None


def psnr_text(worst: float | None, least: float) -> str:
    """The smallest PSNR and its tolerance, for people."""
    return "equal to eager's" if worst is None else f"PSNR at least {worst:.1f} dB (tolerance {least:.0f})"


def share_correct(images: list[Pixels], scenes: list[Scene]) -> float:
    """The share of the demo's images that show all that was asked for."""
    return sum(score(image, scene).all_correct for image, scene in zip(images, scenes, strict=True)) / len(images)


def is_demo(manifest: Manifest) -> bool:
    """Whether the version was exported from the demo checkpoint, whose images can be scored."""
    try:
        return manifest.checkpoint.fingerprint == open_checkpoint(DEMO_CHECKPOINT).fingerprint
    except CheckpointError:
        return False
