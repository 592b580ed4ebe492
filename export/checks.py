"""Refuses exports that cannot succeed, before anything is built."""

import os

from export.build import Builder
from export.checkpoint import Checkpoint
from export.errors import ArgumentsError, SourceError, UnsupportedError
from export.estimate import check_disk, check_resources, download_use, estimate_listed, nearest_existing
from export.hubs import Listing
from export.manifest import Backend, Target
from export.repository import ServingDefaults, free_version
from export.request import ExportRequest
from export.reuse import earlier_work
from export.spec import MIN_SIZE, SIZE_MULTIPLE, SMALLEST_MAX_SIZE, Precision, pixels


def check_request(request: ExportRequest, builder: Builder | None) -> None:
    """Checks the request by itself, without its checkpoint.

    Raises:
        ArgumentsError: it has sizes that no server would take, or its repository is no folder to write to.
        UnsupportedError: its backend cannot build here, or not as asked.
        VersionExistsError: the version that it is to write is there, and to be kept.
    """
    _check_sizes(request.serving)
    _check_fp8(request)
    if builder is not None:
        builder.check(request.precision)
    _check_writable(request)
    free_version(request.model, request.version, request.existing)


def _check_writable(request: ExportRequest) -> None:
    there = nearest_existing(request.model.absolute())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written to" if there.is_dir() else "is not a folder"
        raise ArgumentsError(f"--repository {request.repository}: {there} {what}; give a folder that can be written to")


def _check_fp8(request: ExportRequest) -> None:
    if request.precision is not Precision.FP8:
        return
    targets = request.options.targets
    if request.backend is not Backend.AOTINDUCTOR or not all(map(_computes_fp8, targets)):
        raise UnsupportedError(
            "--precision fp8 is for --backend aotinductor on CUDA GPUs of compute capability 8.9 or newer (RTX 40 and "
            f"50, H100, H200, B200), and --backend {request.backend} for {', '.join(map(str, targets))} is asked for; "
            "leave out --precision, or export with that backend on such a GPU"
        )


def _computes_fp8(target: Target) -> bool:
    return target.compute_capability is not None and tuple(map(int, target.compute_capability.split("."))) >= (8, 9)


def _check_sizes(serving: ServingDefaults) -> None:
    largest = serving.max_size
    if largest < SMALLEST_MAX_SIZE or largest % SIZE_MULTIPLE:
        raise ArgumentsError(
            f"--max-size {largest}: a multiple of {SIZE_MULTIPLE} from {SMALLEST_MAX_SIZE} is accepted"
        )
    named = [("--default-size", serving.default_size), *(("--warmup-size", size) for size in serving.warmup_sizes)]
    for option, size in named:
        if any(side % SIZE_MULTIPLE or not MIN_SIZE <= side <= largest for side in pixels(size)):
            raise ArgumentsError(
                f"{option} {size} cannot be served; sides that are multiples of {SIZE_MULTIPLE} from {MIN_SIZE} to "
                f"{largest} are accepted. Give another, or another --max-size"
            )


def check_download(request: ExportRequest) -> None:
    """Checks what can be known of a checkpoint before it is downloaded.

    Raises:
        ResourcesError: as `check_listed`.
    """
    try:
        listing = request.source.listing()
    except SourceError:
        return  # it may be cached; if not, the download says what is wrong
    if listing is not None and listing.incomplete:
        check_listed(request, listing)


def check_listed(request: ExportRequest, listing: Listing) -> None:
    """The same of what its hub has listed, of which some has to be downloaded.

    Raises:
        ResourcesError: there is too little disk for the download, or too little disk or memory for the export even if
            the files turn out to hold as few numbers as they may.
    """
    if may_reuse(request):
        check_disk([download_use(listing)])  # what is left to build is known when the checkpoint is there
    else:
        check_resources(estimate_listed(request, listing).least, request.repository, listing)


def may_reuse(request: ExportRequest) -> bool:
    """Whether there is anything that an export could take engines from."""
    return any(folder.exists() for folder in earlier_work(request))


def check_reach(request: ExportRequest, checkpoint: Checkpoint) -> None:
    """Raises `ArgumentsError` where the checkpoint's position tables do not reach the sizes asked for."""
    if request.serving.max_size > checkpoint.max_size:
        raise ArgumentsError(
            f"the checkpoint draws up to {checkpoint.max_size} pixels a side, and {request.serving.max_size} is asked "
            f"for; give --max-size {checkpoint.max_size} or less"
        )
