"""What is to be exported and where to: resolved once, at the edge."""

from dataclasses import dataclass
from pathlib import Path

from export.build import BuildOptions
from export.manifest import Backend
from export.onnx import GraphLimits
from export.profiles import ShapeProfile, serving_profiles
from export.repository import Existing, ServingDefaults
from export.sources import Source
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
