"""What lies beside every engine: what it was built from, with and for, and how close to eager it is."""

import hashlib
import importlib.metadata
import json
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from export.checkpoint import Checkpoint, open_checkpoint
from export.errors import CheckpointError, ManifestError, StaleEngineError
from export.parsing import parsed
from export.profiles import ShapeProfile, parity_points
from export.spec import Component, ModelDimensions, Precision, ShapePoint

FILE_NAME = "manifest.json"
FORMAT = 2


class Backend(StrEnum):
    """The kinds of engine. `eager` is PyTorch itself: always there, and what the others fall back to."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"
    ONNXRUNTIME = "onnxruntime"
    AOTINDUCTOR = "aotinductor"
    EAGER = "eager"


# The modules' own code, which is in every graph.
GRAPH_LIBRARIES = ("torch", "diffusers", "transformers")
# An engine loads only with the versions of these that it was built with; another version of any other library that it
# was built with makes another engine, so an export does not reuse it, but it can still be served.
BINDING_LIBRARIES = {
    Backend.TENSORRT: ("tensorrt",),
    Backend.TENSORRT_RTX: ("tensorrt_rtx",),
    Backend.ONNXRUNTIME: ("onnxruntime",),
    Backend.AOTINDUCTOR: ("torch",),
    Backend.EAGER: (),
}
FLASH_ATTENTION = "fa3-fwd"
CALLED_LIBRARIES = (FLASH_ATTENTION,)  # and these, which it calls if it was built with them


@dataclass(frozen=True)
class Target:
    """The kind of device an engine runs on; `compute_capability` is None off CUDA."""

    device: str
    compute_capability: str | None = None

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
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """The record of the file at `path` as it is now."""
        return cls(path.name, path.stat().st_size, sha256(path))


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
        width, height = self.default_size.split("x")
        return int(width), int(height)

    @property
    def parity_points(self) -> tuple[ShapePoint, ...]:
        """The shapes at which the engines are held against eager; guidance doubles the rows of a batch."""
        return parity_points(self.default_pixels, 2 * self.max_batch, self.max_size)

    def engine(self, component: Component) -> EngineRecord | None:
        """The compiled engine of `component`; None where the version serves it with eager."""
        return next((e for e in self.engines if e.component is component), None)

    def write(self, folder: Path) -> None:
        """Writes `folder`/manifest.json, whole or not at all."""
        draft = folder / f"{FILE_NAME}.draft"
        draft.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")
        draft.replace(folder / FILE_NAME)

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


def checkpoint_record(checkpoint: Checkpoint) -> CheckpointRecord:
    """What a manifest holds of `checkpoint`."""
    return CheckpointRecord(str(checkpoint.path), checkpoint.fingerprint, checkpoint.dimensions, checkpoint.shift)


def check_checkpoint(manifest: Manifest) -> None:
    """Checks that the checkpoint is still the one that the version's engines were built from; eager reads it.

    Raises:
        CheckpointError: it is not where it was, or not whole.
        StaleEngineError: it is another.
    """
    path = Path(manifest.checkpoint.path)
    if not path.is_dir():
        raise CheckpointError(
            f"{manifest.name} was exported from the checkpoint {path}, which is read with it and is not there; put it "
            "back, or export the model again from where it is"
        )
    if open_checkpoint(path).fingerprint != manifest.checkpoint.fingerprint:
        raise StaleEngineError(
            f"the checkpoint {path} has changed since {manifest.name} was exported from it; export it again"
        )


def check_engine(record: EngineRecord, folder: Path, target: Target, rebuild: str) -> None:
    """Checks that `record`'s files are whole and were built with these libraries, for this device.

    Raises:
        StaleEngineError: they are not; the message says what differs and ends with the command in `rebuild`.
    """
    what = f"{record.component} engine {folder / record.file}"
    try:
        wrong = (
            _wrong_size(record, folder)
            or wrong_library(record)
            or _wrong_target(record, target)
            or _wrong_content(record, folder)
        )
    except OSError as error:
        wrong = f"cannot be read ({error.strerror})"
    if wrong:
        raise StaleEngineError(f"{what} {wrong}; rebuild it: {rebuild}")


def _wrong_size(record: EngineRecord, folder: Path) -> str:
    for file in record.files:
        path = folder / file.name
        if not path.is_file():
            return f"is not whole: {path} is missing"
        if path.stat().st_size != file.bytes:
            return f"is damaged: {file.bytes} bytes of {file.name} expected, {path.stat().st_size} found"
    return ""


def wrong_library(record: EngineRecord) -> str:
    """What keeps this machine's libraries from loading the engine; empty if nothing does."""
    called = [library for library in CALLED_LIBRARIES if library in record.built_with]
    for library in (*BINDING_LIBRARIES[record.backend], *called):
        built = record.built_with.get(library)
        here = installed_version(library)
        if here is None:
            return f"needs {library} {built}, which is not installed here"
        if built != here:
            return f"was built with {library} {built}, this is {here}"
    return ""


def _wrong_target(record: EngineRecord, target: Target) -> str:
    if target in record.built_for:
        return ""
    return f"was built for {', '.join(map(str, record.built_for))}, this is {target}"


def _wrong_content(record: EngineRecord, folder: Path) -> str:
    for file in record.files:
        if sha256(folder / file.name) != file.sha256:
            return f"is damaged: the bytes of {file.name} are not those of the manifest"
    return ""


def installed_version(library: str) -> str | None:
    """The version of `library` that is installed; None without it."""
    for name in (library, f"{library}-cu13", f"{library}-cu12"):  # TensorRT is also packaged by CUDA's version
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def built_with(libraries: Iterable[str]) -> dict[str, str]:
    """What an engine made here now is built with: a builder's `libraries`, and those that every graph depends on."""
    return {name: installed_version(name) or "unknown" for name in dict.fromkeys((*libraries, *GRAPH_LIBRARIES))}


def rebuild_command(manifest: Manifest, model: Path, record: EngineRecord, here: Target) -> str:
    """The shell command that makes the engines of a version of `model` again: for `here`, if they can be built for it.

    The folder's name counts: it may be another than the one it was exported to.
    """
    options = {
        "--checkpoint": manifest.checkpoint.path,
        "--repository": model.parent,
        "--name": model.name,
        "--backend": record.backend,
        "--precision": manifest.precision,
        "--max-batch": manifest.max_batch,
        "--max-size": manifest.max_size,
        "--default-size": manifest.default_size,
        **_target_options(record, here),
    }
    plan = record.plan
    if plan is not None and plan.verbosity is not Verbosity.LAYER_NAMES:
        options["--profiling-verbosity"] = plan.verbosity
    stripped = ["--strip-weights"] if plan is not None and plan.weights is PlanWeights.STRIPPED else []
    words = (str(word) for option in options.items() for word in option)
    return shlex.join(["zserve", "export", *words, *stripped, "--force"])


def _target_options(record: EngineRecord, here: Target) -> dict[str, str]:
    """What tells an export which devices to build for; nothing where it can only be the GPU that it runs on."""
    targets = record.built_for if here in record.built_for else (here,)
    match record.backend:
        case Backend.TENSORRT_RTX:
            plans_for = [t for t in targets if t.device == "cuda"] or record.built_for  # there are none for a CPU
            return {"--target": ",".join(map(target_name, plans_for))}
        case Backend.AOTINDUCTOR if targets == (Target("cpu"),):
            return {"--device": "cpu"}
        case _:
            return {}


def target_name(target: Target) -> str:
    """A CUDA target as `--target` takes it: sm89."""
    return f"sm{(target.compute_capability or '').replace('.', '')}"


def source_hash() -> str:
    """Hex digest of the export stage's own code, which every graph depends on."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """Hex digest of a whole file."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
