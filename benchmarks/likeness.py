"""How alike two sets of pictures are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from skimage.metrics import structural_similarity

from server.worker.images import Pixels
from verify.images import psnr


@dataclass(frozen=True)
class Likeness:
    """Pictures against pictures, pair by pair; PSNR in dB, None where the two are equal."""

    worst_psnr: float | None
    median_psnr: float | None
    worst_ssim: float
    median_ssim: float
    largest_difference: int  # grey levels of 255, any channel of any pixel


def likeness(pictures: Sequence[Pixels], expected: Sequence[Pixels]) -> Likeness:
    """Compares each picture, uint8 [H, W, 3], with the one expected."""
    pairs = list(zip(pictures, expected, strict=True))
    decibels = [psnr(a, b) for a, b in pairs]
    ssims = [ssim(a, b) for a, b in pairs]
    return Likeness(
        worst_psnr=_finite(min(decibels)),
        median_psnr=_finite(median(decibels)),
        worst_ssim=min(ssims),
        median_ssim=median(ssims),
        largest_difference=max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs),
    )


def ssim(a: Pixels, b: Pixels) -> float:
    """Structural similarity as Wang et al. (2004) define it, the mean of the channels; 1 where both are equal."""
    return float(
        structural_similarity(
            a, b, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def _finite(decibels: float) -> float | None:
    return decibels if math.isfinite(decibels) else None
