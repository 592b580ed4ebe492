"""How alike two sets of pictures are."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from skimage.metrics import structural_similarity

from server.worker.images import Pixels
from verify.distance import finite, largest_difference, psnr, worst_psnr


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
    ssims = [ssim(a, b) for a, b in pairs]
    return Likeness(
        worst_psnr=worst_psnr(pictures, expected),
        median_psnr=finite(median(psnr(a, b) for a, b in pairs)),
        worst_ssim=min(ssims),
        median_ssim=median(ssims),
        largest_difference=largest_difference(pictures, expected),
    )


def ssim(a: Pixels, b: Pixels) -> float:
    """Structural similarity as Wang et al. (2004) define it, the mean of the channels; 1 where both are equal."""
    return float(
        structural_similarity(
            a, b, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )
