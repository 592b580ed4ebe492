"""How far pictures are from those expected of them: the definitions that checks and benchmarks share."""

import math
from collections.abc import Sequence

import numpy as np

from server.worker.images import Pixels


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of two pictures, uint8 [H, W, 3]; infinite where they are equal.

    10 log10(L^2 / MSE), where L is 255 and the mean is over all pixels and channels: Wang and Bovik, "Mean squared
    error: love it or leave it?", IEEE Signal Processing Magazine 26 (1), 2009.
    """
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def finite(decibels: float) -> float | None:
    """None for the infinity of equal pictures, which JSON cannot hold."""
    return decibels if math.isfinite(decibels) else None


def worst_psnr(pictures: Sequence[Pixels], expected: Sequence[Pixels]) -> float | None:
    """The least PSNR of the pairs in dB; None where all are equal."""
    return finite(min(psnr(a, b) for a, b in zip(pictures, expected, strict=True)))


def largest_difference(pictures: Sequence[Pixels], expected: Sequence[Pixels]) -> int:
    """The most that any channel of any pixel of the pairs differs by, in grey levels of 255."""
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(pictures, expected, strict=True))
