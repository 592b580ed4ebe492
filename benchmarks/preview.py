"""What does a preview cost beside a step?

Method: an exported model's compiled engines in this process, no server. For each size one sequence; for each of N pairs
one step and then one preview of it, alternating, so that a drift of the machine's speed affects both. Then the preview
is encoded as JPEG, which the worker does in a thread pool beside the next step; that is given for completeness. A
version without engines is refused, and the denoiser has to stay the compiled one to the end.

Units: milliseconds; `share` is preview over step, pair by pair.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.choice import version_settings
from benchmarks.record import BenchmarkError, percentiles, print_table, row
from benchmarks.serving import add_model, only_backend
from export.devices import default_device
from export.manifest import Backend, Manifest
from export.spec import Component
from server.config import FallbackPolicy
from server.engines.eager import EagerModules
from server.worker.executor import Executor
from server.worker.images import Pixels, encode_preview
from server.worker.sequences import ImageSequence, make_sequences
from verify.painter import one_image
from verify.version import load_engines

SIZES = (256, 512, 1024)
PROMPT = (1,) * 20  # token ids; which ones does not affect the cost
STEPS = 50

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    add_model(parser)
    parser.add_argument("-n", type=pairs, default=30, help=f"pairs a size, at most {STEPS} (default: %(default)s)")


def pairs(text: str) -> int:
    """A count from the command line: each pair is another step of the one sequence."""
    if not text.isdecimal() or not 1 <= int(text) <= STEPS:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 to {STEPS} is accepted")
    return int(text)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints the table.

    Raises:
        BenchmarkError: the version is eager, or of several backends, or eager answered in the engine's place.
        EngineLoadError: an engine cannot be used here.
    """
    device, backend = default_device(), Backend(only_backend(options.model))
    if backend is Backend.EAGER:
        raise BenchmarkError(f"--model {options.model} has no engines; a compiled version is measured")
    executor = load(options.model, device)
    rows = [row({"size": f"{size}x{size}"}, **measure(executor, backend, size, options.n)) for size in SIZES]
    columns = ("step_ms", "preview_ms", "jpeg_ms", "share")
    lines = [[r["case"]["size"], *(r[c]["p50"] for c in columns[:3]), f"{r['share']['p50']:.2%}"] for r in rows]
    print_table(("size", *columns), lines)
    settings = {"engine": backend, **version_settings(options.model, device), "pairs": options.n}
    return {"settings": settings, "rows": rows}


def load(folder: Path, device: str) -> Executor:
    """The engines of a version, all of them compiled."""
    torch.set_num_threads(1)  # as in a worker
    manifest = Manifest.read(folder)
    modules = EagerModules(Path(manifest.checkpoint.path), manifest.precision, device)
    return Executor(
        load_engines(folder, manifest, modules, FallbackPolicy.REFUSE), manifest, device, prompt_cache_size=1
    )


def measure(executor: Executor, backend: Backend, size: int, count: int) -> dict[str, Any]:
    """Steps and previews in turn, at one size."""
    (sequence,) = make_sequences(one_image("", (size, size), STEPS), (PROMPT,), key=0, shift=3.0, now=0.0)
    executor.encode(sequence).result()
    executor.denoise([sequence]).result()
    executor.preview(sequence, 1).result()
    steps, previews, jpegs = [], [], []
    for done in range(count):
        sequence.step = done
        step, _ = timed(lambda: executor.denoise([sequence]).result())
        preview, pixels = timed(partial(preview_after, executor, sequence, done + 1))
        jpeg, _ = timed(partial(encode_preview, pixels))
        steps.append(step)
        previews.append(preview)
        jpegs.append(jpeg)
    used = sequence.engines[Component.DENOISER]
    if used.backend is not backend:
        raise BenchmarkError(f"{backend} is to be measured, and {used.backend} answered: {used.fallback_reason}")
    share = [preview / step for preview, step in zip(previews, steps, strict=True)]
    columns = {"step_ms": steps, "preview_ms": previews, "jpeg_ms": jpegs, "share": share}
    return {name: percentiles(values) for name, values in columns.items()}


def preview_after(executor: Executor, sequence: ImageSequence, step: int) -> Pixels:
    """The first preview after a step, as a request gets it: a second one would find everything in the caches."""
    return executor.preview(sequence, step).result()


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Milliseconds, and what `call` returns."""
    began = time.perf_counter()
    made = call()
    return 1e3 * (time.perf_counter() - began), made
