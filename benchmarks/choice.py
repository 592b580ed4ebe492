"""What a benchmark of the model is run on: the options that those benchmarks share, read once."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import published
from benchmarks.record import BenchmarkError
from export.manifest import Backend, Manifest
from export.repository import versions
from export.spec import IMAGE_PSNR, MIN_SIZE, SIZE_MULTIPLE, Precision, pixels
from export.validity import installed_version

DIFFUSERS = "diffusers"
COMPILED = "diffusers-compile"  # the same pipeline under torch.compile
PIPELINES = (DIFFUSERS, COMPILED)  # the rows that no server has for an engine
FP8 = f"{Backend.AOTINDUCTOR}-{Precision.FP8}"  # a row beside the others, over the same weights
BACKENDS = (*PIPELINES, *(backend.value for backend in Backend), FP8)
REPOSITORY = Path("build") / "benchmark-models"
LARGEST = 2048
# Of images that random weights draw, in dB, where IMAGE_PSNR is for a real model's. Seen: 45.5 in bf16 and 37.8 in FP8
# (docs/performance-log.md).
NOISE_PSNR = {Precision.FP32: 30.0, Precision.BF16: 30.0, Precision.FP8: 25.0}


@dataclass(frozen=True)
class Choice:
    """The model, the engines, the shapes and the device."""

    checkpoint: Path
    backends: tuple[str, ...]
    models: dict[str, Path]  # existing versions, by backend
    repository: Path  # where other engines are built, and found again
    device: str
    sizes: tuple[str, ...]  # WIDTHxHEIGHT; engines with profiles are built for the first
    batches: tuple[int, ...] = (1,)

    @property
    def precision(self) -> Precision:
        """The precision of all rows except `FP8`."""
        return precision_on(self.device)

    def precision_of(self, row: str) -> Precision:
        """The precision of the row named `row`."""
        return Precision.FP8 if row == FP8 else self.precision

    def least_psnr(self, row: str) -> float:
        """In dB, of a row's images and diffusers'."""
        random = self.checkpoint.name.startswith(published.CHECKPOINT)
        return (NOISE_PSNR if random else IMAGE_PSNR)[self.precision_of(row)]

    @property
    def compiled(self) -> tuple[str, ...]:
        """The backends that need engines."""
        return tuple(b for b in self.backends if b not in (*PIPELINES, Backend.EAGER))

    @property
    def max_batch(self) -> int:
        """Images that may share a step: the default of `zserve export`, or more."""
        return max(4, *self.batches)

    @property
    def max_size(self) -> int:
        """Longest side in pixels."""
        return max(LARGEST, *(side for size in self.sizes for side in pixels(size)))

    def settings(self) -> dict[str, str]:
        """For the record."""
        return {"checkpoint": _from_here(self.checkpoint), "precision": self.precision, "device": self.device}


def version_settings(version: Path, device: str) -> dict[str, str]:
    """The same for a version that is measured as it was exported."""
    manifest = Manifest.read(version)
    checkpoint = _from_here(Path(manifest.checkpoint.path))
    return {"checkpoint": checkpoint, "precision": manifest.precision, "device": device}


def _from_here(path: Path) -> str:
    """As the path of a record: the same in every checkout if it is inside it."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def backend_of(row: str) -> Backend:
    """The backend whose engines the row named `row` measures."""
    return Backend.AOTINDUCTOR if row == FP8 else Backend(row)


def precision_on(device: str) -> Precision:
    """As `zserve export` chooses it."""
    return Precision.BF16 if device.startswith("cuda") else Precision.FP32


def add_arguments(parser: argparse.ArgumentParser, *, only: Backend | None = None) -> None:
    """The options that `read` reads; with `only`, that backend is measured and there is none to choose."""
    from export.devices import default_device

    g = parser.add_argument_group("model")
    weights = g.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", type=Path, default=Path("demo/checkpoint"), help="diffusers folder (default: %(default)s)"
    )
    weights.add_argument(
        "--random-weights",
        action="store_true",
        help="the published config of Z-Image-Turbo with random weights: its speed without a download; needs a GPU",
    )
    g.add_argument(
        "--model", type=Path, action="append", default=[],
        help="an exported model's folder, such as models/z-image-demo; may be repeated (default: exported when needed)",
    )  # fmt: skip
    if only is None:
        g.add_argument(
            "--backend", choices=BACKENDS, action="append",
            help="a row; may be repeated (default: diffusers, eager and what is compiled for this device, not "
            f"{COMPILED} or {FP8})",
        )  # fmt: skip
    else:
        parser.set_defaults(backend=[only.value])
    g.add_argument("--repository", type=Path, default=REPOSITORY, help="where engines are built (default: %(default)s)")
    g.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    g.add_argument(
        "--size", type=size, action="append", help="WIDTHxHEIGHT; may be repeated (default: 256x256; CUDA: 1024x1024)"
    )


def read(options: argparse.Namespace) -> Choice:
    """The choice that `options` make; random weights are written where there are none yet.

    Raises:
        BenchmarkError: a model is missing or would not be measured, or the device cannot run what is asked for.
        UnsupportedError: there is no such device.
    """
    cuda = options.device.startswith("cuda")
    _use_device(options.device, cuda, options.random_weights)
    models = _given(options.model, precision_on(options.device))
    chosen = tuple(options.backend or (DIFFUSERS, Backend.EAGER.value, *(models or _compiled(options))))
    for unused in models.keys() - set(chosen):
        raise BenchmarkError(
            f"--model {models[unused]} would be the row {unused}, and the rows are {', '.join(chosen)}"
        )
    checkpoint = options.checkpoint
    if options.random_weights:
        checkpoint = published.checkpoint(options.repository, options.device, precision_on(options.device))
    return Choice(
        checkpoint=checkpoint,
        backends=tuple(dict.fromkeys(chosen)),
        models=models,
        repository=options.repository,
        device=options.device,
        sizes=tuple(options.size or (["1024x1024"] if cuda else ["256x256"])),
        batches=tuple(getattr(options, "batch", None) or (1,)),
    )


def _use_device(device: str, cuda: bool, random_weights: bool) -> None:
    from export.devices import use_device

    if random_weights and not cuda:
        raise BenchmarkError(
            "--random-weights needs a GPU with 24 GB or more: the published config takes 20.5 GB in bf16. Without it "
            "the demo checkpoint is measured, on any machine"
        )
    use_device(device)  # clocks and memory are those of the current one


def _compiled(options: argparse.Namespace) -> tuple[str, ...]:
    """What can be built and run on the device."""
    if not options.device.startswith("cuda"):
        return (Backend.AOTINDUCTOR.value, Backend.ONNXRUNTIME.value)
    tensorrt = (Backend.TENSORRT.value,) if installed_version("tensorrt") else ()
    return (Backend.AOTINDUCTOR.value, *tensorrt)


def _given(models: Sequence[Path], precision: Precision) -> dict[str, Path]:
    """The newest version of each of `models`, by row."""
    found: dict[str, Path] = {}
    for model in models:
        row, folder = _newest(model, precision)
        if row in found:
            raise BenchmarkError(f"--model {model}: {found[row]} is the row {row} already; one of them is measured")
        found[row] = folder
    return found


def _newest(model: Path, precision: Precision) -> tuple[str, Path]:
    """The row and the folder of a model's newest version."""
    numbers = versions(model)
    if not numbers:
        raise BenchmarkError(f"--model {model}: no version of a model is there; `zserve export` makes one")
    folder = model / str(numbers[-1])
    manifest = Manifest.read(folder)
    backends = sorted({e.backend.value for e in manifest.engines})
    if len(backends) > 1:
        raise BenchmarkError(f"--model {model}: its engines are of several backends ({', '.join(backends)}); one is")
    if manifest.precision is Precision.FP8:
        return FP8, folder
    if manifest.precision is not precision:
        raise BenchmarkError(f"--model {model}: its engines are {manifest.precision}; {precision} is measured here")
    return (backends or [Backend.EAGER.value])[0], folder


def size(text: str) -> str:
    """A size from the command line."""
    sides = text.split("x")
    if len(sides) != 2 or not all(s.isdecimal() and int(s) >= MIN_SIZE and int(s) % SIZE_MULTIPLE == 0 for s in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r}: WIDTHxHEIGHT is accepted, multiples of {SIZE_MULTIPLE} from {MIN_SIZE} on, such as 256x256"
        )
    return text


def positive(text: str) -> int:
    """A count from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on is accepted")
    return int(text)
