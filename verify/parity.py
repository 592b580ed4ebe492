"""`zserve parity`: the engines of a version against eager PyTorch on this machine, in numbers and in images."""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.cli import NOT_POSSIBLE
from export.devices import checked_device, current_target, use_device
from export.errors import ExportError, UnsupportedError
from export.manifest import Backend, Manifest, Target
from export.parity import closeness
from export.profiles import TYPICAL_CAPTION
from export.spec import IMAGE_PSNR, Component, ShapePoint, component_specs, example_inputs
from export.validity import check_checkpoint
from server.config import FallbackPolicy, cpu_threads
from server.engines.eager import EagerModules
from server.engines.served import ServedComponent
from server.errors import NonFiniteError, ZServeError
from server.requests import EngineUse
from server.worker.executor import Components
from verify.images import ImageParity, compare_images, draw, psnr_text
from verify.painter import Painted
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
    belongs_here: bool = True  # False: there is no engine for this device, so nothing can be said of it here

    @property
    def within(self) -> bool | None:
        """Whether it made every output and is as close to eager as the spec demands; None if it does not belong."""
        error, tolerance = self.relative_error, self.tolerance
        if not self.belongs_here:
            return None
        return error is not None and tolerance is not None and error <= tolerance


@dataclass(frozen=True)
class Report:
    """The verdict on a version."""

    device: str
    components: tuple[ComponentParity, ...]
    images: ImageParity | None  # None: no engine belongs here
    least_psnr: float

    @property
    def within(self) -> bool | None:
        """Whether all engines that belong here ran and are within their tolerances; None where none does."""
        if self.images is None:
            return None
        return all(c.within is not False for c in self.components) and self.images.within(self.least_psnr)


STATUSES = {True: 0, False: 1, None: NOT_POSSIBLE}


def main(argv: Sequence[str]) -> int:
    """Prints the figures; returns the exit status."""
    told = (
        "exit status: 0 all engines for this device are right; 1 one is past its tolerance, was not loaded or failed, "
        f"or there is no such version; 2 bad arguments; {NOT_POSSIBLE} the version has no engine for this device, or "
        "the device is not here"
    )
    parser = argparse.ArgumentParser(prog="zserve parity", description=__doc__, epilog=told)
    add_arguments(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--images", type=int, default=4, help="how many to draw with both (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        version = open_version(arguments)
        check_checkpoint(version.manifest)
        device = checked_device(arguments.device)
        use_device(device)
        report = compare(version, device, max(1, arguments.images))
    except UnsupportedError as error:
        print(f"zserve parity: {error}", file=sys.stderr)
        return NOT_POSSIBLE
    except (ExportError, ZServeError, torch.OutOfMemoryError) as error:
        print(f"zserve parity: {error}", file=sys.stderr)
        return 1
    print(json.dumps(as_json(report), allow_nan=False) if arguments.json else as_table(report))
    return STATUSES[report.within]


def compare(version: Version, device: str, images: int) -> Report:
    """Compares every engine that is for `device`, then whole images.

    The engines run first and are then closed, since they and eager may not fit into memory at once.

    Raises:
        ZServeError: eager cannot draw either.
    """
    torch.set_num_threads(cpu_threads(1))
    manifest, here = version.manifest, current_target(device)
    ours = replace(manifest, engines=tuple(e for e in manifest.engines if here in e.built_for))
    report = Report(
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        components=tuple(_absent(manifest, component, here) for component in Component),
        images=None,
        least_psnr=IMAGE_PSNR[manifest.precision],
    )
    if not ours.engines:
        return report
    modules = EagerModules(Path(manifest.checkpoint.path), manifest.precision, device)
    engines = _measure(version.folder, ours, modules, images)
    eager = _measure(version.folder, replace(manifest, engines=()), modules, images)
    return replace(
        report,
        components=tuple(
            absent if ours.engine(absent.component) is None else _compare(ours, absent.component, engines, eager)
            for absent in report.components
        ),
        images=compare_images(manifest, engines.painted.pictures, eager.painted.pictures),
    )


def _absent(manifest: Manifest, component: Component, here: Target) -> ComponentParity:
    """The result for a component that has no engine for this device."""
    record = manifest.engine(component)
    if record is None:
        return ComponentParity(component, Backend.EAGER, not_run="the version has no engine", belongs_here=False)
    why = f"built for {', '.join(map(str, record.built_for))}, this is {here}"
    return ComponentParity(component, record.backend, not_run=why, belongs_here=False)


@dataclass(frozen=True)
class _Outputs:
    """A component's output at every point that is compared, and how long a call took."""

    tensors: tuple[Tensor, ...]
    uses: tuple[EngineUse, ...]  # the engine that made each of them
    milliseconds: float


@dataclass(frozen=True)
class _Measured:
    components: dict[Component, _Outputs]
    painted: Painted
    last: tuple[EngineUse, ...]  # the engines in use at the end

    def fallbacks(self, component: Component) -> str:
        """Why eager answered calls of `component` in its engine's place; empty if it answered none."""
        uses = (*self.components[component].uses, *self.painted.uses, *self.last)
        reasons = dict.fromkeys(use.fallback_reason for use in uses if use.component is component)
        return "; ".join(reason for reason in reasons if reason)


def _measure(folder: Path, manifest: Manifest, modules: EagerModules, images: int) -> _Measured:
    """Runs what `manifest` lists, eager for the rest."""
    served = load_engines(folder, manifest, modules, FallbackPolicy.EAGER)
    outputs = {c: _outputs(manifest, c, served[c], modules.device) for c in Component}
    painted = _paint(manifest, served, str(modules.device), images)
    measured = _Measured(outputs, painted, tuple(component.use for component in served.values()))
    for component in served.values():
        component.close()
    return measured


def _paint(manifest: Manifest, served: Components, device: str, images: int) -> Painted:
    """The images; a denoiser whose result is not finite is replaced by eager, as in the server."""
    try:
        return draw(manifest, served, device, images)
    except NonFiniteError as error:
        if not served[Component.DENOISER].compiled:
            raise
        served[Component.DENOISER].quarantine(str(error))
        return draw(manifest, served, device, images)


def _outputs(manifest: Manifest, component: Component, served: ServedComponent, device: torch.device) -> _Outputs:
    points = enumerate(manifest.parity_points)
    made = (served.run(_inputs(manifest, component, point, device, seed)) for seed, point in points)
    tensors, uses = zip(*((output.cpu(), use) for output, use in made), strict=True)
    return _Outputs(tensors, uses, _milliseconds(manifest, component, served, device))


def _compare(manifest: Manifest, component: Component, engines: _Measured, eager: _Measured) -> ComponentParity:
    record = manifest.engine(component)
    assert record is not None
    if problem := engines.fallbacks(component):
        return ComponentParity(component, record.backend, not_run=problem)
    engine, expected = engines.components[component], eager.components[component]
    close = closeness(engine.tensors, expected.tensors)
    if not math.isfinite(close.relative_error):
        return ComponentParity(component, record.backend, not_run="its output, or eager's, is not finite")
    return ComponentParity(
        component=component,
        backend=record.backend,
        relative_error=close.relative_error,
        cosine=close.cosine,
        tolerance=component_specs(manifest.checkpoint.dimensions)[component].tolerance[manifest.precision],
        points=close.points,
        milliseconds=engine.milliseconds,
        eager_milliseconds=expected.milliseconds,
    )


def _inputs(
    manifest: Manifest, component: Component, point: ShapePoint, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    dimensions = manifest.checkpoint.dimensions
    return example_inputs(component_specs(dimensions)[component], point, dimensions, seed=seed, device=device)


def _milliseconds(manifest: Manifest, component: Component, served: ServedComponent, device: torch.device) -> float:
    """Of one call at the default size, batch 1: the median of `REPEATS`, whichever engine answers."""
    width, height = manifest.default_pixels
    inputs = _inputs(manifest, component, ShapePoint(1, TYPICAL_CAPTION, height, width), device)
    for _ in range(2):  # libraries prepare themselves in the first; on CUDA AOTInductor records the second
        _seconds(served, inputs, device)
    return statistics.median(_seconds(served, inputs, device) for _ in range(REPEATS)) * 1e3


def _seconds(served: ServedComponent, inputs: dict[str, Tensor], device: torch.device) -> float:
    """Seconds of one call until the device is done; the output stays there."""
    started = time.perf_counter()
    served.run(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def as_json(report: Report) -> dict[str, Any]:
    """The report with its verdict."""
    return {**asdict(report), "within_tolerance": report.within}


def as_table(report: Report) -> str:
    """The same for people."""
    lines = [f"on {report.device}"]
    for c in report.components:
        if c.not_run:
            verdict = "BAD" if c.belongs_here else "not for this device"
            lines.append(f"  {c.component:<15} {c.backend:<12} {verdict}: {c.not_run}")
        else:
            lines.append(
                f"  {c.component:<15} {c.backend:<12} {'ok ' if c.within else 'BAD'} relative error "
                f"{c.relative_error:.1e} (tolerance {c.tolerance:.0e}), cosine {c.cosine:.7f}, "
                f"{c.milliseconds:.1f} ms (eager {c.eager_milliseconds:.1f})"
            )
    return "\n".join(lines if report.images is None else [*lines, *_image_lines(report.images, report.least_psnr)])


def _image_lines(images: ImageParity, least_psnr: float) -> list[str]:
    lines = [
        f"  {images.images} images: {psnr_text(images.worst_psnr, least_psnr)}, at most "
        f"{images.largest_difference} grey levels apart"
    ]
    if images.score is not None and images.eager_score is not None:
        lines.append(f"  demo score: {images.score:.0%} all correct (eager {images.eager_score:.0%})")
    return lines
