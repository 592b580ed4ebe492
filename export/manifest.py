"""The manifest of a version: how each engine was built, and how close it is to eager."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Self

from export.checkpoint import Checkpoint
from export.errors import ManifestError
from export.files import write_whole
from export.parsing import parsed
from export.profiles import ShapeProfile, parity_points, serving_profiles
from export.spec import Component, ModelDimensions, Precision, ShapePoint, pixels

FILE_NAME = "manifest.json"
FORMAT = 3
# Of a file over `SAMPLED_FROM` bytes only `BLOCKS` blocks are hashed: plans hold up to 12 GB of weights, and every
# worker checks its engines when it starts.
SAMPLED_FROM, BLOCKS, BLOCK = 256 << 20, 256, 1 << 20


class Backend(StrEnum):
    """The kinds of engine. `eager` is PyTorch itself: always there, and what the others fall back to."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"
    ONNXRUNTIME = "onnxruntime"
    AOTINDUCTOR = "aotinductor"
    EAGER = "eager"


@dataclass(frozen=True)
class Target:
    """The kind of device an engine runs on; `compute_capability` is None off CUDA.

    `model` is the GPU's, where it was there. Only TensorRT's plans are bound to it, so it tells no targets apart.
    """

    device: str
    compute_capability: str | None = None
    model: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        if self.compute_capability is None:
            return self.device
        return f"{self.device} (compute capability {self.compute_capability})"


@dataclass(frozen=True)
class Parity:
    """The largest relative L2 error and the smallest cosine against eager, over `points` input shapes."""

    relative_error: float
    cosine: float
    points: int


class PlanWeights(StrEnum):
    """Where a TensorRT plan's weights are."""

    INSIDE = "inside"
    STRIPPED = "stripped"  # in a safetensors file beside it, put in when it is loaded


class Verbosity(StrEnum):
    """How much a TensorRT plan tells of its layers."""

    LAYER_NAMES = "layer_names"
    DETAILED = "detailed"


@dataclass(frozen=True)
class PlanRecord:
    """What only TensorRT plans have."""

    profiles: tuple[ShapeProfile, ...]
    weights: PlanWeights
    verbosity: Verbosity
    graph: str  # SHA-256 of the ONNX graph without its weights: equal for fine-tunes of one model
    fused_attention: int
    decomposed_attention: int  # attention that no fused kernel fits, run as separate layers


@dataclass(frozen=True)
class FileRecord:
    """A file of a version."""

    name: str
    bytes: int
    digest: str  # see `content_digest`

    @classmethod
    def of(cls, path: Path) -> Self:
        """The record of the file at `path` as it is now."""
        return cls(path.name, path.stat().st_size, content_digest(path))


@dataclass(frozen=True)
class EngineRecord:
    """One engine of a version: its own file, and those that it needs beside it."""

    component: Component
    backend: Backend
    files: tuple[FileRecord, ...]
    built_with: dict[str, str]
    built_for: tuple[Target, ...]
    parity: Parity | None  # None: built for a device that the exporting machine does not have, and never run
    plan: PlanRecord | None = None
    instructions: tuple[str, ...] = ()  # sets of them that a CPU has to have, in Linux's names

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError(f"the {self.component} engine has no files")

    @property
    def file(self) -> str:
        """Name of the engine's own file."""
        return self.files[0].name

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(f.bytes for f in self.files)


@dataclass(frozen=True)
class CheckpointRecord:
    """The checkpoint a version was built from, and what serving needs to know of it."""

    path: str
    fingerprint: str
    dimensions: ModelDimensions
    shift: float

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """The record of `checkpoint`."""
        return cls(str(checkpoint.path), checkpoint.fingerprint, checkpoint.dimensions, checkpoint.shift)


@dataclass(frozen=True)
class PreviewProjection:
    """Linear map from one latent's channels to RGB in 0..255: `rgb = latent @ weight + bias`."""

    weight: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]


@dataclass(frozen=True)
class Manifest:
    """One version of a model in the repository."""

    name: str
    created: str
    checkpoint: CheckpointRecord
    precision: Precision
    max_batch: int
    max_size: int
    default_size: str
    engines: tuple[EngineRecord, ...]
    preview: PreviewProjection
    source: str  # hash of the code that made the graphs; another one makes other graphs
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.default_size):
            raise ValueError(f"default_size is {self.default_size!r}, not WIDTHxHEIGHT")

    @property
    def default_pixels(self) -> tuple[int, int]:
        """Width and height of the default size."""
        return pixels(self.default_size)

    @property
    def served_shapes(self) -> ShapeProfile:
        """Every shape that the engines were exported for; guidance doubles the rows of a batch."""
        return serving_profiles(self.default_pixels, 2 * self.max_batch, self.max_size)[1]

    @property
    def parity_points(self) -> tuple[ShapePoint, ...]:
        """The shapes at which the engines are compared with eager; guidance doubles the rows of a batch."""
        return parity_points(self.default_pixels, 2 * self.max_batch, self.max_size)

    def engine(self, component: Component) -> EngineRecord | None:
        """The compiled engine of `component`; None where the version serves it with eager."""
        return next((e for e in self.engines if e.component is component), None)

    def write(self, folder: Path) -> None:
        """Writes `folder`/manifest.json, whole or not at all."""
        write_whole(folder / FILE_NAME, f"{json.dumps(asdict(self), indent=2)}\n".encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads `folder`/manifest.json.

        Raises:
            ManifestError: missing, not JSON, of another format, or with fields that do not belong.
        """
        path = folder / FILE_NAME
        try:
            raw = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ManifestError(f"{path} cannot be read ({error}); export the model again") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else None
            raise ManifestError(f"{path} has format {found}; this zserve reads {FORMAT}: export the model again")
        try:
            manifest: Self = parsed(cls, raw)
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{path} does not fit format {FORMAT} ({error!r}); export the model again") from error
        return manifest


def content_digest(file: Path) -> str:
    """Hex SHA-256 of a file; of a large one, of blocks spread evenly over it, the first and the last included."""
    size = file.stat().st_size
    with file.open("rb") as f:
        if size <= SAMPLED_FROM:
            return hashlib.file_digest(f, "sha256").hexdigest()
        digest = hashlib.sha256()
        for number in range(BLOCKS):
            f.seek(number * (size - BLOCK) // (BLOCKS - 1))
            digest.update(f.read(BLOCK))
    return digest.hexdigest()
