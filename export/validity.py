"""Whether an engine or a checkpoint may be used here: files, device, and the libraries and code that shaped it."""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from export.checkpoint import Checkpoint, open_checkpoint
from export.errors import CheckpointError, StaleEngineError
from export.manifest import Backend, EngineRecord, Manifest, Target, content_digest

# The modules' own code, which is in every graph.
GRAPH_LIBRARIES = ("torch", "diffusers", "transformers")
# An engine loads only with exactly these versions. A change in any other build library prevents reuse by an export, but
# not serving.
BINDING_LIBRARIES = {
    Backend.TENSORRT: ("tensorrt",),
    Backend.TENSORRT_RTX: ("tensorrt_rtx",),
    Backend.ONNXRUNTIME: ("onnxruntime",),
    Backend.AOTINDUCTOR: ("torch",),
    Backend.EAGER: (),
}
FLASH_ATTENTION = "fa3-fwd"
CALLED_LIBRARIES = (FLASH_ATTENTION,)  # optional: must match too if the engine was built with them

# The beginnings of their names: other flags of a CPU say nothing of the code that it can run.
INSTRUCTION_SETS = (
    *("sse", "ssse", "avx", "fma", "f16c", "bmi", "abm", "popcnt", "movbe", "adx", "amx", "gfni", "vaes", "vpclmul"),
    *("asimd", "sve", "bf16", "i8mm"),
)


def check_checkpoint(manifest: Manifest) -> Checkpoint:
    """The checkpoint, if it is still the one that the version's engines were built from; eager reads it.

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
    checkpoint = open_checkpoint(path)
    if checkpoint.fingerprint != manifest.checkpoint.fingerprint:
        raise StaleEngineError(
            f"the checkpoint {path} has changed since {manifest.name} was exported from it; export it again"
        )
    return checkpoint


def check_engine(record: EngineRecord, folder: Path, target: Target, rebuild: str) -> None:
    """Raises `StaleEngineError` for what `engine_fault` finds, with the command in `rebuild`."""
    fault = engine_fault(record, folder, target)
    if fault:
        raise StaleEngineError(f"{fault}; rebuild it: {rebuild}")


def engine_fault(record: EngineRecord, folder: Path, target: Target) -> str:
    """Why the engine in `folder` cannot be used on `target` here; empty if it can.

    Its files have to be whole and built with these libraries, for this kind of device.
    """
    try:
        wrong = (
            _wrong_size(record, folder)
            or _wrong_library(record)
            or _wrong_target(record, target)
            or _wrong_cpu(record)
            or _wrong_content(record, folder)
        )
    except OSError as error:
        wrong = f"cannot be read ({error.strerror})"
    return f"{record.component} engine {folder / record.file} {wrong}" if wrong else ""


def _wrong_size(record: EngineRecord, folder: Path) -> str:
    for file in record.files:
        path = folder / file.name
        if not path.is_file():
            return f"is not whole: {path} is missing"
        if path.stat().st_size != file.bytes:
            return f"is damaged: {file.bytes} bytes of {file.name} expected, {path.stat().st_size} found"
    return ""


def _wrong_library(record: EngineRecord) -> str:
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
    built = next((b for b in record.built_for if b == target), None)
    if built is None:
        return f"was built for {', '.join(map(str, record.built_for))}, this is {target}"
    # TensorRT itself only warns of another model of GPU, and its plan may fail there, or be slow.
    if record.backend is Backend.TENSORRT and built.model != target.model:
        return f"was built on {built.model}, this is {target.model}"
    return ""


def _wrong_cpu(record: EngineRecord) -> str:
    missing = sorted(set(record.instructions) - set(cpu_instructions()))
    return f"was compiled for a CPU with {', '.join(missing)}, which this one does not have" if missing else ""


@cache
def cpu_instructions() -> tuple[str, ...]:
    """The instruction sets of this machine's CPU that compilers use, in Linux's names; none where it does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").partition(":")[2].split()
    return tuple(sorted(flag for flag in flags if flag.startswith(INSTRUCTION_SETS)))


def _wrong_content(record: EngineRecord, folder: Path) -> str:
    for file in record.files:
        if content_digest(folder / file.name) != file.digest:
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


@cache
def source_hash() -> str:
    """Hex digest of the export stage's own code, which every graph depends on."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()
