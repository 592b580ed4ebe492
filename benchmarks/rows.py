"""What the benchmarks of engines share: options, prompts, and how rows are compared with each other."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from benchmarks import choice
from benchmarks.choice import DIFFUSERS, Choice
from benchmarks.record import BenchmarkError, ratios
from demo.scenes import sample_scenes
from export.manifest import Backend
from server.worker.images import Pixels
from verify.distance import largest_difference, worst_psnr


def add_arguments(parser: argparse.ArgumentParser, *, repetitions: int) -> None:
    """Model, engines, shapes and repetitions."""
    choice.add_arguments(parser)
    parser.add_argument("--batch", type=choice.positive, action="append", help="images at once; may be repeated (1)")
    parser.add_argument(
        "-n", "--repetitions", type=choice.positive, default=repetitions, help="that count (default: %(default)s)"
    )
    parser.add_argument("--warm-up", type=choice.positive, default=2, help="that do not count (default: %(default)s)")


def settings(chosen: Choice, options: argparse.Namespace) -> dict[str, Any]:
    """What the rows have in common."""
    return {**chosen.settings(), "warm_up": options.warm_up, "repetitions": options.repetitions}


def prompts(count: int) -> list[str]:
    """Different prompts, so that no cache can help."""
    return list(dict.fromkeys(scene.prompt for scene in sample_scenes(2 * count + 8, seed=99)))[:count]


def alike(texts: Iterable[str], length: Callable[[str], int], count: int) -> Iterator[list[str]]:
    """`texts` in groups of `count` of one length, each as soon as it is full."""
    waiting: dict[int, list[str]] = {}
    for text in texts:
        group = waiting.setdefault(length(text), [])
        group.append(text)
        if len(group) == count:
            yield waiting.pop(length(text))


def warmed(
    groups: Iterable[list[str]], length: Callable[[str], int], *, warm_up: int, repetitions: int
) -> tuple[list[list[str]], list[list[str]]]:
    """`warm_up` groups of each length among the `repetitions` that count, and these.

    The first calls of a shape prepare it, which takes as long as several steps.
    """
    coming = iter(groups)
    counted = list(islice(coming, repetitions))
    missing = Counter({length(group[0]): warm_up for group in counted})
    before: list[list[str]] = []
    while any(missing.values()):
        group = next(coming, None)
        if group is None:
            raise BenchmarkError(
                "there are too few prompts for this --warm-up; give a smaller one, or a smaller --batch"
            )
        if missing[length(group[0])]:
            missing[length(group[0])] -= 1
            before.append(group)
    return before, counted


def speedups(taken: Mapping[str, Sequence[float]], backend: str) -> dict[str, dict[str, float]]:
    """How many times as fast `backend` is as diffusers and as eager, repetition by repetition."""
    others = [name for name in (DIFFUSERS, Backend.EAGER.value) if name in taken and name != backend]
    return {other: ratios(taken[other], taken[backend]) for other in others}


def check_count(what: str, made: int, expected: int) -> None:
    """Raises `BenchmarkError` if more or fewer calls were made than expected."""
    if made != expected:
        raise BenchmarkError(f"{what} ran {made} times, and {expected} were asked for")


def compare_images(images: Sequence[Pixels], expected: Sequence[Pixels], least_psnr: float) -> dict[str, Any]:
    """Least PSNR in dB (None: all are equal) and largest difference in grey levels.

    Raises:
        BenchmarkError: one is under `least_psnr`.
    """
    psnr = worst_psnr(images, expected)
    if psnr is not None and psnr < least_psnr:
        raise BenchmarkError(
            f"the image is another one: {psnr:.1f} dB from the reference, {least_psnr:.0f} are accepted"
        )
    return {"psnr_db": psnr, "largest_difference": largest_difference(images, expected)}
