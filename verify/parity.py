"""`zserve parity`: the engines of a version against eager PyTorch on this machine, in numbers and in images."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.devices import default_device
from export.errors import ExportError
from export.manifest import Backend, Manifest
from export.parity import closeness
from export.spec import CAPTION_MULTIPLE, IMAGE_PSNR, Component, ShapePoint, component_specs, example_inputs
from server.config import FallbackPolicy, cpu_threads
from server.engines.eager import EagerModules
from server.engines.served import ServedComponent
from server.requests import EngineUse
from server.worker.images import Pixels
from verify.images import ImageParity, compare_images, draw
from verify.version import Version, add_arguments, load_engines, open_version

REPEATS = 5


@dataclass(frozen=True)
class ComponentParity:
    """One engine against eager over `points` shapes; `not_run` says why there are no figures."""

    component: Component
    backend: Backend
    relative_error: float | None = None
    cosine: float | None = None
    tolerance: float | None = None
    points: int = 0
    milliseconds: float | None = None  # of one call at the default size, batch 1, median
    eager_milliseconds: float | None = None
    not_run: str = ""

    @property
    def within(self) -> bool:
        """Whether it ran and is as close to eager as the spec demands; NaN is not."""
        error, tolerance = self.relative_error, self.tolerance
        return error is not None and tolerance is not None and error <= tolerance


@dataclass(frozen=True)
class Report:
    """The verdict on a version."""

    device: str
    components: tuple[ComponentParity, ...]
    images: ImageParity
    least_psnr: float

    @property
    def within(self) -> bool:
        """Whether something ran, and all that ran is within its tolerance."""
        ran = [c for c in self.components if not c.not_run]
        return bool(ran) and all(c.within for c in ran) and self.images.worst_psnr >= self.least_psnr


def main(argv: Sequence[str]) -> int:
    """Prints the figures; returns 1 if one is past its tolerance or nothing could be run."""
    parser = argparse.ArgumentParser(prog="zserve parity", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--against", choices=["eager"], default="eager", help="what to compare with")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--images", type=int, default=4, help="how many to draw with both (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        version = open_version(arguments)
        report = compare(version, arguments.device or default_device(), max(1, arguments.images))
    except ExportError as error:
        print(f"zserve parity: {error}", file=sys.stderr)
        return 1
    print(json.dumps(as_json(report)) if arguments.json else as_table(report))
    return 0 if report.within else 1


def compare(version: Version, device: str, images: int) -> Report:
    """Compares every engine that runs on `device`, then whole images.

    The engines run first and are closed then, since there may not be room for them and for eager at once.
    """
    torch.set_num_threads(cpu_threads(1))
    manifest = version.manifest
    modules = EagerModules(Path(manifest.checkpoint.path), manifest.precision, device)
    engines = _measure(version.folder, manifest, modules, images)
    eager = _measure(version.folder, replace(manifest, engines=()), modules, images)
    return Report(
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        components=tuple(_compare(manifest, c, engines.components[c], eager.components[c]) for c in Component),
        images=compare_images(manifest, engines.pictures, eager.pictures),
        least_psnr=IMAGE_PSNR[manifest.precision],
    )


@dataclass(frozen=True)
class _Outputs:
    """What a component gave at every point that is compared, and how long a call took."""

    tensors: tuple[Tensor, ...]
    milliseconds: float
    use: EngineUse


@dataclass(frozen=True)
class _Measured:
    components: dict[Component, _Outputs]
    pictures: list[Pixels]


def _measure(folder: Path, manifest: Manifest, modules: EagerModules, images: int) -> _Measured:
    """Runs what `manifest` lists, eager for the rest."""
    served = load_engines(folder, manifest, modules, FallbackPolicy.EAGER)
    measured = _Measured(
        {c: _outputs(manifest, c, served[c], modules.device) for c in Component},
        draw(manifest, served, str(modules.device), images),
    )
    for component in served.values():
        component.close()
    return measured


def _outputs(manifest: Manifest, component: Component, served: ServedComponent, device: torch.device) -> _Outputs:
    points = enumerate(manifest.parity_points)
    tensors = tuple(_call(manifest, component, point, device, seed)(served) for seed, point in points)
    milliseconds = _milliseconds(manifest, component, served, device)
    return _Outputs(tensors, milliseconds, served.use)  # the use last: it says whether the engine failed when it ran


def _compare(manifest: Manifest, component: Component, engine: _Outputs, eager: _Outputs) -> ComponentParity:
    record = manifest.engine(component)
    wanted = Backend.EAGER if record is None else record.backend
    if engine.use.backend is Backend.EAGER:
        return ComponentParity(component, wanted, not_run=engine.use.fallback_reason or "the version has no engine")
    close = closeness(engine.tensors, eager.tensors)
    return ComponentParity(
        component=component,
        backend=wanted,
        relative_error=close.relative_error,
        cosine=close.cosine,
        tolerance=component_specs(manifest.checkpoint.dimensions)[component].tolerance[manifest.precision],
        points=close.points,
        milliseconds=engine.milliseconds,
        eager_milliseconds=eager.milliseconds,
    )


def _call(
    manifest: Manifest, component: Component, point: ShapePoint, device: torch.device, seed: int = 0
) -> Callable[[ServedComponent], Tensor]:
    dimensions = manifest.checkpoint.dimensions
    made = example_inputs(component_specs(dimensions)[component], point, dimensions, seed=seed)
    inputs = {name: tensor.to(device) for name, tensor in made.items()}
    return lambda served: served.run(inputs)[0].cpu()


def _milliseconds(manifest: Manifest, component: Component, served: ServedComponent, device: torch.device) -> float:
    width, height = manifest.default_pixels
    call = _call(manifest, component, ShapePoint(1, CAPTION_MULTIPLE, height, width), device)
    call(served)
    call(served)  # where CUDA graphs are recorded
    return statistics.median(_seconds(call, served) for _ in range(REPEATS)) * 1e3


def _seconds(call: Callable[[ServedComponent], Tensor], served: ServedComponent) -> float:
    started = time.perf_counter()
    call(served)  # ends with a copy to the host, so the device is done
    return time.perf_counter() - started


def as_json(report: Report) -> dict[str, Any]:
    """The report with its verdict."""
    return {**asdict(report), "within_tolerance": report.within}


def as_table(report: Report) -> str:
    """The same for a person."""
    lines = [f"on {report.device}"]
    for c in report.components:
        if c.not_run:
            lines.append(f"  {c.component:<15} {c.backend:<12} not run: {c.not_run}")
        else:
            lines.append(
                f"  {c.component:<15} {c.backend:<12} {'ok ' if c.within else 'BAD'} relative error "
                f"{c.relative_error:.1e} (tolerance {c.tolerance:.0e}), cosine {c.cosine:.7f}, "
                f"{c.milliseconds:.1f} ms (eager {c.eager_milliseconds:.1f})"
            )
    i = report.images
    lines.append(
        f"  {i.images} images: PSNR at least {i.worst_psnr:.1f} dB (tolerance {report.least_psnr:.0f}), at most "
        f"{i.largest_difference} grey levels apart"
    )
    if i.score is not None and i.eager_score is not None:
        lines.append(f"  demo score: {i.score:.0%} all correct (eager {i.eager_score:.0%})")
    return "\n".join(lines)
