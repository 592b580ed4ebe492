"""What an export will need, told before it begins: downloads, disk and memory, from file headers alone."""

import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil

from export.checkpoint import WEIGHTS, Checkpoint, read_safetensors_header, weight_files
from export.errors import ResourcesError
from export.manifest import Backend
from export.modules.load import PARTS
from export.request import ExportRequest
from export.spec import Component
from export.weights import BYTES

GB = 1_000_000_000
LIBRARIES_MEMORY = 2 * GB  # torch, the graph, and what a compiler holds beside the weights
CODE_BYTES = 60_000_000  # an engine without its weights

# The transformer's tensors that the prompt encoder holds; all others are the denoiser's.
CAPTION_TENSORS = ("cap_embedder.", "cap_pad_token", "context_refiner.")


@dataclass(frozen=True)
class Estimate:
    """Bytes; disk and memory at their highest during the export."""

    weights: dict[Component, int]  # in the precision of the export
    engines: dict[Component, int]
    disk: int
    memory: int


def estimate(request: ExportRequest, checkpoint: Checkpoint) -> Estimate:
    """What the export of `checkpoint` will need."""
    width = BYTES[request.precision]
    weights = {c: width * elements(checkpoint.path, c) for c in Component}
    engines = {c: _engine_bytes(request.backend, size) for c, size in weights.items()}
    largest = max(weights.values())
    if request.backend in (Backend.TENSORRT, Backend.TENSORRT_RTX):
        # The weights pass through the disk, and through memory once as the parser's and once as the plan's.
        disk, memory = sum(engines.values()) + largest, 2 * largest
    elif request.backend is Backend.ONNXRUNTIME:
        disk, memory = sum(engines.values()), sum(weights.values()) + 2 * largest
    else:
        disk, memory = sum(engines.values()), sum(weights.values())
    return Estimate(weights, engines, disk, memory + LIBRARIES_MEMORY)


def check_resources(needed: Estimate, repository: Path) -> None:
    """Refuses an export that would end for want of disk or memory.

    Raises:
        ResourcesError: with what is needed and what there is.
    """
    disk, memory = free_disk(repository), psutil.virtual_memory().available
    if needed.disk > disk:
        raise ResourcesError(
            f"this export needs {needed.disk / GB:.1f} GB of disk at {repository} and {disk / GB:.1f} GB are free; "
            "free some, or give another --repository"
        )
    if needed.memory > memory:
        raise ResourcesError(
            f"this export needs {needed.memory / GB:.1f} GB of memory and {memory / GB:.1f} GB are available; "
            "end other programs, or export on a larger machine and copy the repository"
        )


def free_disk(folder: Path) -> int:
    """Free bytes where `folder` is, or will be."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def _engine_bytes(backend: Backend, weights: int) -> int:
    match backend:
        case Backend.EAGER:
            return 0
        case Backend.AOTINDUCTOR:
            return CODE_BYTES
        case _:
            return CODE_BYTES + weights


def elements(checkpoint: Path, component: Component) -> int:
    return sum(
        prod(entry["shape"])
        for part in PARTS[component]
        for file in weight_files(checkpoint / part, WEIGHTS[part])
        for name, entry in read_safetensors_header(file).items()
        if name != "__metadata__" and _belongs(component, part, name)
    )


def _belongs(component: Component, part: str, name: str) -> bool:
    match component:
        case Component.PROMPT_ENCODER:
            return part == "text_encoder" or name.startswith(CAPTION_TENSORS)
        case Component.DENOISER:
            return not name.startswith(CAPTION_TENSORS)
        case Component.IMAGE_DECODER:
            return name.startswith(("decoder.", "post_quant_conv."))
