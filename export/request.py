"""What is to be exported and where to: resolved once, at the edge."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from export.build import BuildOptions
from export.devices import checked_device, current_target
from export.errors import ArgumentsError, UnsupportedError
from export.hubs import Hub
from export.manifest import Backend, PlanWeights, Verbosity
from export.onnx import GraphLimits
from export.profiles import ShapeProfile, serving_profiles
from export.repository import Existing, ServingDefaults
from export.sources import Network, Source, network_from_environment
from export.spec import Precision


@dataclass(frozen=True)
class ExportRequest:
    """One run of `zserve export`."""

    source: Source
    repository: Path
    name: str
    backend: Backend
    precision: Precision
    device: str  # that eager runs on, and engines where they are built for it
    options: BuildOptions
    serving: ServingDefaults
    version: int | None = None  # None: the next number
    existing: Existing = Existing.KEEP

    @property
    def model(self) -> Path:
        """The model's folder in the repository."""
        return self.repository / self.name

    @property
    def limits(self) -> GraphLimits:
        """How far the graphs reach; guidance doubles the rows of a batch."""
        return GraphLimits(2 * self.serving.max_batch, self.serving.max_size)

    @property
    def profiles(self) -> tuple[ShapeProfile, ...]:
        """What engines with profiles are built for."""
        return serving_profiles(self.serving.default_pixels, self.limits.max_rows, self.limits.max_size)


def resolved_request(arguments: argparse.Namespace) -> ExportRequest:
    """What the flags of `export.cli` ask for on this machine.

    Raises:
        UnsupportedError: they do not fit each other, or the machine.
    """
    # ONNX Runtime computes on the CPU whatever else is here; a GPU asked for is refused by its builder.
    device = checked_device(arguments.device or ("cpu" if arguments.backend is Backend.ONNXRUNTIME else None))
    cuda = device.startswith("cuda")
    backend = arguments.backend or (Backend.AOTINDUCTOR if cuda else Backend.ONNXRUNTIME)
    tensorrt = backend in (Backend.TENSORRT, Backend.TENSORRT_RTX)
    return ExportRequest(
        source=_source(arguments),
        repository=arguments.repository,
        name=arguments.name,
        backend=backend,
        precision=arguments.precision or (Precision.BF16 if cuda or tensorrt else Precision.FP32),
        device=device,
        options=_options(arguments, backend, device),
        serving=ServingDefaults(
            default_size=arguments.default_size,
            warmup_sizes=tuple(arguments.warmup_size),
            max_batch=arguments.max_batch,
            max_size=arguments.max_size,
        ),
        version=arguments.version,
        existing=Existing.REPLACE if arguments.force else Existing.KEEP,
    )


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.source is Hub.LOCAL and (arguments.revision or arguments.cache_dir):
        raise ArgumentsError(
            "--revision and --cache-dir are for a hub, and --source is local; leave them out, or give "
            "--source huggingface or --source modelscope"
        )
    return Source(
        hub=arguments.source,
        name=arguments.checkpoint,
        revision=arguments.revision,
        cache_dir=arguments.cache_dir,
        network=Network.OFFLINE if arguments.offline else network_from_environment(),
    )


def _options(arguments: argparse.Namespace, backend: Backend, device: str) -> BuildOptions:
    chosen = arguments.target or arguments.strip_weights or arguments.profiling_verbosity is not Verbosity.LAYER_NAMES
    if chosen and backend not in (Backend.TENSORRT, Backend.TENSORRT_RTX):
        raise ArgumentsError(
            f"--target, --strip-weights and --profiling-verbosity are for TensorRT, and --backend is {backend}; "
            "leave them out"
        )
    if backend is Backend.TENSORRT_RTX and not arguments.target and not device.startswith("cuda"):
        raise UnsupportedError(
            "--backend tensorrt_rtx on a machine without a GPU has to be told what to build for, "
            "for example --target sm89,sm120"
        )
    return BuildOptions(
        targets=arguments.target or (current_target(device),),
        weights=PlanWeights.STRIPPED if arguments.strip_weights else PlanWeights.INSIDE,
        verbosity=arguments.profiling_verbosity,
    )
