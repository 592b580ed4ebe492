"""What a backend must be able to do for the export stage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.export import ExportedProgram

from export.manifest import PlanRecord, PlanWeights, Target, Verbosity
from export.onnx import GraphSource, export_program
from export.profiles import ShapeProfile
from export.spec import EXPORT_EXAMPLE, ComponentSpec, Precision, ShapePoint


@dataclass(frozen=True)
class BuildOptions:
    """What the operator chose for the engines; all but `targets` is for TensorRT."""

    targets: tuple[Target, ...] = ()
    weights: PlanWeights = PlanWeights.INSIDE
    verbosity: Verbosity = Verbosity.LAYER_NAMES


@dataclass(frozen=True)
class BuildInputs:
    """Everything a builder may need of a component."""

    source: GraphSource
    spec: ComponentSpec
    profiles: tuple[ShapeProfile, ...]
    repository: Path | None  # where another model may have a plan to share; None: everything is built
    module: Callable[[], nn.Module]  # reads the weights into memory, so only builders that need them there call it
    report: Callable[[], None] = lambda: None  # for a long build to call; raises KeyboardInterrupt if it is to end

    def program(self, module: nn.Module, example: ShapePoint = EXPORT_EXAMPLE) -> ExportedProgram:
        """`module` (the component or a form of it), traced with the spec's dynamic shapes."""
        return export_program(module, self.spec, self.source.dimensions, self.source.limits, example)


@dataclass(frozen=True)
class Built:
    """A built engine: its own file first, then the files it needs beside it."""

    files: tuple[Path, ...]
    plan: PlanRecord | None = None
    calls: tuple[str, ...] = ()  # libraries that it needs to run, besides its backend's
    instructions: tuple[str, ...] = ()  # sets of them that it may use, besides those of every CPU of its kind


class Runner(Protocol):
    """A loaded engine, for checking."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor: ...


class Builder(Protocol):
    """Builds engine files of one backend and loads them again to be checked."""

    libraries: tuple[str, ...]  # whose versions go into the manifest, besides those of `GRAPH_LIBRARIES`

    def check(self, precision: Precision) -> None:
        """Called before anything is downloaded or built.

        Raises:
            UnsupportedError: the backend cannot build here, or not with these options.
        """

    def build(self, inputs: BuildInputs, folder: Path) -> Built:
        """Writes the engine's files into `folder`.

        Raises:
            BuildError: the backend could not build it.
            torch.OutOfMemoryError: for want of memory.
        """

    def load(self, path: Path, module: nn.Module, spec: ComponentSpec) -> Runner:
        """Loads the engine at `path`; `module` lends its weights to a backend that keeps none."""
