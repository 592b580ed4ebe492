"""Estimates disk and memory before an export starts, from file headers or from the sizes on a hub."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil

from export.checkpoint import WEIGHTS, Checkpoint, tensors
from export.control_groups import memory_left
from export.errors import ResourcesError
from export.hubs import Listing
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
# The folder of the checkpoint that nearly all of a component's weights are in.
MAIN_PARTS = {
    Component.PROMPT_ENCODER: "text_encoder",
    Component.DENOISER: "transformer",
    Component.IMAGE_DECODER: "vae",
}


@dataclass(frozen=True)
class Estimate:
    """Bytes; disk and memory at their highest during the export."""

    weights: dict[Component, int]  # of the components that are built, in the precision of the export
    engines: dict[Component, int]
    disk: int
    memory: int


@dataclass(frozen=True)
class Range:
    """Bounds for a checkpoint that is not downloaded yet."""

    least: Estimate
    most: Estimate


def estimate(request: ExportRequest, checkpoint: Checkpoint, held: Collection[Component] = ()) -> Estimate:
    """What the export of `checkpoint` will need beside the engines that are `held` already."""
    return _estimate(request, {c: elements(checkpoint.path, c) for c in Component if c not in held})


def estimate_listed(request: ExportRequest, listing: Listing) -> Range:
    """Bounds from file sizes on the hub, where a weight takes 2 or 4 bytes."""
    stored = {c: listing.weight_bytes(f"{part}/{WEIGHTS[part]}") for c, part in MAIN_PARTS.items()}
    least, most = ({c: size // width for c, size in stored.items()} for width in (4, 2))
    return Range(_estimate(request, least), _estimate(request, most))


def _estimate(request: ExportRequest, numbers: Mapping[Component, int]) -> Estimate:
    """`numbers`: the count of weights per component."""
    weights = {c: BYTES[request.precision.weights] * count for c, count in numbers.items()}
    engines = {c: _engine_bytes(request.backend, size) for c, size in weights.items()}
    largest = max(weights.values(), default=0)
    if request.backend in (Backend.TENSORRT, Backend.TENSORRT_RTX):
        # The weights pass through the disk, and through memory as the network's and the plan's: 1.84 times as many were
        # seen (6 layers of the denoiser, TensorRT-RTX 1.7.1), beside the parser's mapping of their file, which the
        # kernel can drop.
        disk, memory = sum(engines.values()) + largest, 2 * largest
    elif request.backend is Backend.ONNXRUNTIME:
        disk, memory = sum(engines.values()), 3 * largest  # one component at a time: its module, its graph, its file
    elif request.backend is Backend.AOTINDUCTOR:
        disk, memory = sum(engines.values()), largest
    else:
        disk, memory = 0, 0  # nothing is built
    return Estimate(weights, engines, disk, memory + LIBRARIES_MEMORY)


def check_resources(needed: Estimate, repository: Path, listing: Listing | None = None) -> None:
    """Refuses an export that would run out of disk or memory, counting the download of what `listing` lacks.

    Raises:
        ResourcesError: with what is needed and what there is.
    """
    engines = DiskUse(repository, needed.disk, "--repository")
    check_disk([engines] if listing is None else [download_use(listing), engines])
    memory = min((psutil.virtual_memory().available, *memory_left()))  # a container may have less than its machine
    if needed.memory > memory:
        raise ResourcesError(
            f"this export needs {needed.memory / GB:.1f} GB of memory and {memory / GB:.1f} GB are available; "
            "end other programs, or export on a larger machine and copy the repository"
        )


@dataclass(frozen=True)
class DiskUse:
    """How many bytes will be written to a folder, and the option that names it."""

    folder: Path
    bytes: int
    option: str


def download_use(listing: Listing) -> DiskUse:
    """The disk that a download takes."""
    return DiskUse(listing.cache, listing.missing_bytes, "--cache-dir")


def check_disk(uses: Sequence[DiskUse]) -> None:
    """Raises `ResourcesError` where one disk has too little for all that goes there."""
    disks: dict[int, list[DiskUse]] = {}
    for use in uses:
        disks.setdefault(nearest_existing(use.folder).stat().st_dev, []).append(use)
    for together in disks.values():
        needed, free = sum(use.bytes for use in together), free_disk(together[0].folder)
        if needed > free:
            folders = " and ".join(str(use.folder) for use in together)
            raise ResourcesError(
                f"this export needs {needed / GB:.1f} GB of disk at {folders} "
                f"and {free / GB:.1f} GB are free; free some, or give another "
                f"{' or '.join(use.option for use in together)}"
            )


def free_disk(folder: Path) -> int:
    """Free bytes where `folder` is, or will be."""
    return shutil.disk_usage(nearest_existing(folder)).free


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest above it that is there."""
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


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
        for _, name, entry in tensors(checkpoint / part)
        if _belongs(component, part, name)
    )


def _belongs(component: Component, part: str, name: str) -> bool:
    match component:
        case Component.PROMPT_ENCODER:
            return part == "text_encoder" or name.startswith(CAPTION_TENSORS)
        case Component.DENOISER:
            return not name.startswith(CAPTION_TENSORS)
        case Component.IMAGE_DECODER:
            return name.startswith(("decoder.", "post_quant_conv."))
