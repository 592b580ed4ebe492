"""Does compiling change my picture?

Method: every engine and precision that runs on this machine is exported from the demo checkpoint (valid exports are
reused) and draws the same prompts from the same seeds through the server's own image path, one by one, in 8 steps,
without guidance. Its pictures are compared with those of eager PyTorch in fp32, which equals diffusers. Then the same
engine draws them again: with the prompts from its cache, in batches of 4, and in 9 steps, each time compared with its
own first pictures. An engine that is not possible on this machine is a line with the reason. No TF32 is used.

It fails if an engine that is possible here is not built, is not loaded or falls back; if a picture has a lower PSNR
against that reference than `zserve parity` accepts (40 dB in fp32, 20 in bf16, 12 in fp8); and if the median PSNR of an
engine in bf16 is over 0.5 dB lower than that of eager in bf16, which is drawn beside any such engine. A median over few
pictures scatters by as much, so that last check takes 64 or more.

Units: `right` counts pictures that show what was asked for (demo/score.py); PSNR in dB and SSIM (1 is equal) are the
worst and the median picture's; `grey` is the largest difference of any channel of any pixel, of 255. In the JSON
object, the last line, the share that is right has its 95 % interval and PSNR is null where pictures are equal. The
contact sheet shows the differences from eager fp32 magnified 32 times.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.choice import positive
from benchmarks.demo_quality import LARGE, Share
from benchmarks.likeness import Likeness, likeness
from benchmarks.quality_sheet import contact_sheet
from demo.scenes import Scene, sample_scenes
from demo.score import score
from export.cli import NOT_POSSIBLE
from export.devices import checked_device, default_device, use_device
from export.errors import UnsupportedError
from export.manifest import Backend, Manifest
from export.repository import versions
from export.spec import IMAGE_PSNR, Precision
from server.config import FallbackPolicy
from server.engines.eager import EagerModules
from server.errors import EngineLoadError
from server.worker.images import Pixels
from verify.painter import Painter, Size
from verify.version import load_engines

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SEED = 31
STEPS, OTHER_STEPS, BATCH = 8, 9, 4
LOSS, ENOUGH = 0.5, 64  # dB that compiling may cost in bf16, and how many pictures it takes to tell
SHOWN = 3  # pictures on the contact sheet
SMALL: Size = (256, 256)
GRIDS: dict[str, tuple[Size, ...]] = {"quick": (SMALL,), "full": (SMALL, (512, 512), *LARGE)}
HEAD = (
    f"{'size':<10}{'engine':<18}{'against':<16}{'right':>9}{'PSNR':>8}{'median':>8}{'SSIM':>9}{'median':>8}{'grey':>6}"
)


@dataclass(frozen=True)
class Variant:
    """One way of running the model."""

    backend: Backend
    precision: Precision

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"


REFERENCE = Variant(Backend.EAGER, Precision.FP32)
EAGER_BF16 = Variant(Backend.EAGER, Precision.BF16)
COMPILED = {  # backends, and the precisions they are built in
    "cpu": {Backend.ONNXRUNTIME: (Precision.FP32,), Backend.AOTINDUCTOR: (Precision.FP32, Precision.BF16)},
    "cuda": {
        Backend.AOTINDUCTOR: tuple(Precision),
        Backend.TENSORRT: (Precision.BF16,),
        Backend.TENSORRT_RTX: (Precision.BF16,),
    },
}


@dataclass(frozen=True)
class Row:
    """One comparison; where there is none, `not_run` says why."""

    size: str
    engine: str
    against: str
    right: Share | None = None
    likeness: Likeness | None = None
    not_run: str = ""
    possible: bool = True  # False: this machine cannot run it at all, which says nothing against the engine

    def record(self) -> record.Row:
        """The row as it is recorded."""
        figures = asdict(self)
        case = {key: figures.pop(key) for key in ("size", "engine", "against")}
        return record.row(case, **figures)

    def __str__(self) -> str:
        start = f"{self.size:<10}{self.engine:<18}{self.against:<16}"
        if self.likeness is None or self.right is None:
            return f"{start}not run: {self.not_run}"
        like, right = self.likeness, f"{self.right.right} of {self.right.count}"
        psnr = "".join("   equal" if db is None else f"{db:8.1f}" for db in (like.worst_psnr, like.median_psnr))
        ssim = f"{like.worst_ssim:9.4f}{like.median_ssim:8.4f}"
        return f"{start}{right:>9}{psnr}{ssim}{like.largest_difference:6}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--grid", choices=GRIDS, default="quick", help="sizes: 256x256, or all (default: %(default)s)")
    parser.add_argument("--images", type=positive, default=16, help="pictures a size (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--only", action="append", help="an engine such as 'onnxruntime fp32' (default: all)")
    models = ROOT / "build" / "quality-models"
    parser.add_argument("--repository", type=Path, default=models, help="of the exports (default: %(default)s)")
    parser.add_argument("--sheets", type=Path, default=RESULTS, help="folder of the sheet (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table and writes the contact sheet; returns the record.

    Raises:
        EngineLoadError, UnsupportedError: eager cannot draw, or there is no such device.
    """
    use_device(checked_device(options.device))
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions allows it
    print(HEAD, flush=True)
    scenes = sample_scenes(options.images, SEED)
    reference: dict[Size, list[Pixels]] = {}
    rows: list[Row] = []
    shown: dict[str, list[Pixels]] = {}
    for variant in variants(options):
        for row, size, pictures in measure(variant, scenes, reference, options):
            print(row, flush=True)
            rows.append(row)
            if size == SMALL:
                shown.setdefault(str(variant), pictures[:SHOWN])
    options.sheets.mkdir(parents=True, exist_ok=True)
    contact_sheet(shown).save(options.sheets / f"{name(options)}.png")
    settings = {"device": options.device, "steps": STEPS, "prompts": [scene.prompt for scene in scenes]}
    failed = faults(rows) + (losses(rows) if options.images >= ENOUGH else [])
    print(*(f"WRONG: {what}" for what in failed), sep="\n")
    return {"settings": settings, "rows": [row.record() for row in rows], "failed": failed}


def faults(rows: list[Row]) -> list[str]:
    """Engines that should have run here and did not, and those with a picture too far from the reference's."""
    found = []
    for row in rows:
        least = IMAGE_PSNR[Precision(row.engine.split()[-1])]
        worst = row.likeness.worst_psnr if row.likeness and row.against == str(REFERENCE) else None
        if row.not_run and row.possible:
            found.append(f"{row.engine} was not run: {row.not_run}")
        elif worst is not None and worst < least:
            found.append(f"{row.engine} at {row.size} is {worst:.1f} dB from {REFERENCE}, {least:.0f} are accepted")
    return list(dict.fromkeys(found))


def losses(rows: list[Row]) -> list[str]:
    """Where compiling has cost more, in bf16, than it may."""
    eager = str(EAGER_BF16)
    median = {
        (row.size, row.engine): row.likeness.median_psnr
        for row in rows
        if row.likeness and row.against == str(REFERENCE) and row.engine.endswith(Precision.BF16)
    }
    return [
        f"{engine} at {size} is {psnr:.1f} dB from {REFERENCE}, {eager} {expected:.1f}"
        for (size, engine), psnr in median.items()
        if psnr is not None and (expected := median.get((size, eager))) is not None and psnr < expected - LOSS
    ]


def name(options: argparse.Namespace) -> str:
    """The name of the record and of the sheet."""
    return f"quality_{options.device.partition(':')[0]}"


def variants(options: argparse.Namespace) -> list[Variant]:
    """The reference first, then all that may run on the device, or those asked for, with eager beside any in bf16."""
    compiled = COMPILED[options.device.partition(":")[0]]
    built = [Variant(backend, precision) for backend, precisions in compiled.items() for precision in precisions]
    others = [EAGER_BF16, *built]
    known = [str(variant) for variant in others]
    unknown = set(options.only or ()) - set(known)
    if unknown:
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: {', '.join(known)} are accepted")
    chosen = [v for v in others if not options.only or str(v) in options.only]
    compared = [EAGER_BF16] if any(v.precision is Precision.BF16 for v in chosen) else []
    return list(dict.fromkeys([REFERENCE, *compared, *chosen]))


Measured = tuple[Row, Size | None, list[Pixels]]


def measure(
    variant: Variant, scenes: list[Scene], reference: dict[Size, list[Pixels]], options: argparse.Namespace
) -> Iterator[Measured]:
    """The rows of one variant, each with its pictures; those of the first variant become the reference."""
    try:
        painter = load(variant, options)
    except (EngineLoadError, UnsupportedError) as error:
        if variant.backend is Backend.EAGER:  # the others are compared with it
            raise
        possible = isinstance(error, EngineLoadError)
        yield Row("", str(variant), "", not_run=str(error), possible=possible), None, []
        return
    for size in GRIDS[options.grid]:
        yield from _measure(variant, painter, scenes, size, reference)


def _measure(
    variant: Variant, painter: Painter, scenes: list[Scene], size: Size, reference: dict[Size, list[Pixels]]
) -> Iterator[Measured]:
    prompts = [scene.prompt for scene in scenes]

    def row(against: str, pictures: list[Pixels], expected: list[Pixels]) -> Measured:
        told = f"{size[0]}x{size[1]}", str(variant), against
        if problem := painter.problem():
            return Row(*told, not_run=problem), size, pictures
        right = Share.of([score(p, scene).all_correct for p, scene in zip(pictures, scenes, strict=True)])
        return Row(*told, right, likeness(pictures, expected)), size, pictures

    def draw(steps: int = STEPS, at_once: int = 1) -> list[Pixels]:
        return painter.draw(prompts, size, steps=steps, at_once=at_once).pictures

    painter.forget()
    alone = draw()
    yield row("eager fp32", alone, reference.setdefault(size, alone))
    encoded = painter.encoded
    cached = draw()
    assert painter.encoded == encoded, "a prompt was encoded again"
    yield row("cached prompts", cached, alone)
    painter.forget()
    yield row(f"batches of {BATCH}", draw(at_once=BATCH), alone)
    yield row(f"{OTHER_STEPS} steps", draw(OTHER_STEPS), alone)


def load(variant: Variant, options: argparse.Namespace) -> Painter:
    """The variant's engines, exported first.

    Raises:
        UnsupportedError: this machine cannot have them.
        EngineLoadError: it could, but they are not built or not loaded.
    """
    model = f"demo-{variant.backend}-{variant.precision}"
    command = [
        sys.executable, "-P", "-m", "zserve", "export", "--checkpoint", "demo/checkpoint", "--repository",
        str(options.repository), "--name", model, "--backend", variant.backend, "--precision", variant.precision,
        "--device", options.device, "--default-size", "256x256",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"the export ended with status {done.returncode}"]
        raise (UnsupportedError if done.returncode == NOT_POSSIBLE else EngineLoadError)(said[-1])
    folder = options.repository / model / str(versions(options.repository / model)[-1])
    manifest = Manifest.read(folder)
    modules = EagerModules(Path(manifest.checkpoint.path), manifest.precision, options.device)
    engines = load_engines(folder, manifest, modules, FallbackPolicy.REFUSE)
    return Painter(manifest, engines, options.device)
