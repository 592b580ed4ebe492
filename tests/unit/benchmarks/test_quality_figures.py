"""The quality benchmark's figures on pairs whose likeness is known, and its sheet."""

import argparse
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from benchmarks.demo_quality import Share, chosen
from benchmarks.likeness import likeness, ssim
from benchmarks.quality import Row, faults, losses, variants
from benchmarks.quality_sheet import TITLE, contact_sheet, magnified
from benchmarks.record import BenchmarkError
from benchmarks.rows import compare_images
from server.worker.images import Pixels
from verify.distance import psnr


def flat(level: int, size: int = 32) -> Pixels:
    return np.full((size, size, 3), level, np.uint8)


def noise(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.mark.parametrize("difference", [1, 5, 51])
def test_psnr_of_a_constant_difference(difference: int) -> None:
    assert psnr(flat(100), flat(100 + difference)) == pytest.approx(20 * math.log10(255 / difference))


def test_psnr_of_one_pixel() -> None:
    other = flat(100)
    other[3, 4, 1] = 110
    assert psnr(flat(100), other) == pytest.approx(10 * math.log10(255**2 / (10**2 / (32 * 32 * 3))))


def test_every_comparison_has_scikit_images_psnr() -> None:
    pictures, expected = [noise(0), noise(2)], [noise(1), noise(3)]
    worst = min(peak_signal_noise_ratio(b, a, data_range=255) for a, b in zip(pictures, expected, strict=True))
    compared = compare_images(pictures, expected, 0.0)
    assert (compared["psnr_db"], compared["largest_difference"]) == (pytest.approx(worst), 254)
    assert likeness(pictures, expected).worst_psnr == compared["psnr_db"]


@pytest.mark.parametrize(("a", "b"), [(100, 100), (100, 110), (0, 255), (20, 60)])
def test_ssim_of_flat_pictures_is_that_of_their_means(a: int, b: int) -> None:
    c = (0.01 * 255) ** 2
    assert ssim(flat(a), flat(b)) == pytest.approx((2 * a * b + c) / (a * a + b * b + c), abs=1e-6)


def test_ssim_of_unlike_pictures_is_about_nothing() -> None:
    assert ssim(noise(0), noise(0)) == 1
    assert abs(ssim(noise(0), noise(1))) < 0.1


def test_likeness_takes_the_worst_and_the_median() -> None:
    got = likeness([flat(100), flat(101), flat(110)], [flat(100)] * 3)
    assert got.worst_psnr == pytest.approx(20 * math.log10(255 / 10))
    assert got.median_psnr == pytest.approx(20 * math.log10(255))
    assert got.worst_ssim < got.median_ssim < 1
    assert got.largest_difference == 10


def test_equal_pictures_have_no_psnr_and_the_record_stays_json() -> None:
    got = likeness([noise(2)], [noise(2)])
    assert (got.worst_psnr, got.median_psnr, got.worst_ssim, got.largest_difference) == (None, None, 1, 0)
    assert json.loads(json.dumps(asdict(got), allow_nan=False))["worst_psnr"] is None


# From Wilson's formula; 0 of 10 and 10 of 10 are each other's mirror.
@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(95, 100, 0.8882, 0.9785), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055)],
)
def test_a_share_has_wilsons_interval(right: int, count: int, low: float, high: float) -> None:
    share = Share.of([True] * right + [False] * (count - right))
    assert (share.right, share.count, share.share) == (right, count, right / count)
    assert (share.low, share.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_questions_of_some_sizes_alone_are_asked() -> None:
    wanted = argparse.Namespace(suite="full", size=["768x1344", "1280x720"])
    assert [(q.size, q.count) for q in chosen(wanted)] == [("768x1344", 64), ("1280x720", 64)]
    with pytest.raises(BenchmarkError, match="--size 96x96: the quick suite has 256x256, 512x512"):
        chosen(argparse.Namespace(suite="quick", size=["256x256", "96x96"]))


def test_the_sheet_has_a_column_an_engine_and_shows_differences_magnified() -> None:
    sheet = np.asarray(contact_sheet({"one": [flat(100)], "other": [flat(102)]}))
    assert sheet.shape[0] == 2 * (32 + TITLE)
    assert (sheet[TITLE, 0] == 100).all() and (sheet[TITLE, -1] == 102).all()
    assert (sheet[-1, 0] == 0).all() and (sheet[-1, -1] == 64).all()
    assert magnified(flat(0), flat(255)).max() == 255


def test_compiling_may_cost_half_a_decibel_in_bf16() -> None:
    alike = likeness([flat(100)], [flat(110)])
    assert alike.median_psnr is not None

    def row(engine: str, less: float, against: str = "eager fp32") -> Row:
        return Row("256x256", engine, against, likeness=replace(alike, median_psnr=alike.median_psnr - less))

    eager, others = row("eager bf16", 0.0), [row("aotinductor fp32", 9.0), row("aotinductor bf16", 9.0, "9 steps")]
    assert losses([eager, *others, row("aotinductor bf16", 0.4)]) == []
    (told,) = losses([eager, *others, row("aotinductor bf16", 0.6)])
    assert told == "aotinductor bf16 at 256x256 is 27.5 dB from eager fp32, eager bf16 28.1"
    assert losses(others) == []


def test_an_engine_that_draws_another_picture_is_a_fault() -> None:
    alike = likeness([flat(100)], [flat(101)])

    def row(engine: str, decibels: float | None, against: str = "eager fp32") -> Row:
        return Row("256x256", engine, against, likeness=replace(alike, worst_psnr=decibels))

    equal = [row("eager fp32", None), row("onnxruntime fp32", None)]
    assert faults([*equal, row("onnxruntime fp32", 5.0, "9 steps")]) == []
    assert faults([row("aotinductor fp32", 40.0), row("aotinductor bf16", 20.0), row("aotinductor fp8", 12.0)]) == []
    assert faults([row("aotinductor fp32", 39.9), row("aotinductor bf16", 19.9)]) == [
        "aotinductor fp32 at 256x256 is 39.9 dB from eager fp32, 40 are accepted",
        "aotinductor bf16 at 256x256 is 19.9 dB from eager fp32, 20 are accepted",
    ]


def test_an_engine_that_does_not_run_is_a_fault_where_it_is_possible() -> None:
    killed = Row("", "aotinductor bf16", "", not_run="its process was killed")
    assert faults([replace(killed, possible=False)]) == []
    assert faults([killed, killed]) == ["aotinductor bf16 was not run: its process was killed"]


def test_eager_in_bf16_is_drawn_beside_an_engine_in_bf16() -> None:
    def drawn(*only: str) -> list[str]:
        return [str(variant) for variant in variants(argparse.Namespace(device="cpu", only=only))]

    assert drawn("aotinductor bf16") == ["eager fp32", "eager bf16", "aotinductor bf16"]
    assert drawn("onnxruntime fp32") == ["eager fp32", "onnxruntime fp32"]
    assert drawn() == ["eager fp32", "eager bf16", "onnxruntime fp32", "aotinductor fp32", "aotinductor bf16"]
