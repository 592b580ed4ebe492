"""What can be said against an export before anything is read, downloaded or built."""

from export.build import Builder
from export.checkpoint import Checkpoint
from export.errors import UnsupportedError
from export.repository import ServingDefaults, free_version, pixels
from export.request import ExportRequest
from export.spec import MIN_SIZE, SIZE_MULTIPLE, SMALLEST_MAX_SIZE


def check_request(request: ExportRequest, builder: Builder | None) -> None:
    """Checks the request by itself, without its checkpoint.

    Raises:
        UnsupportedError: its backend cannot build here or not as asked, or it has sizes that no server would take.
        VersionExistsError: the version that it is to write is there, and to be kept.
    """
    _check_sizes(request.serving)
    if builder is not None:
        builder.check(request.precision)
    free_version(request.model, request.version, request.existing)


def _check_sizes(serving: ServingDefaults) -> None:
    largest = serving.max_size
    if largest < SMALLEST_MAX_SIZE or largest % SIZE_MULTIPLE:
        raise UnsupportedError(
            f"--max-size {largest}: a multiple of {SIZE_MULTIPLE} from {SMALLEST_MAX_SIZE} is accepted"
        )
    named = [("--default-size", serving.default_size), *(("--warmup-size", size) for size in serving.warmup_sizes)]
    for option, size in named:
        if any(side % SIZE_MULTIPLE or not MIN_SIZE <= side <= largest for side in pixels(size)):
            raise UnsupportedError(
                f"{option} {size} cannot be served; sides that are multiples of {SIZE_MULTIPLE} from {MIN_SIZE} to "
                f"{largest} are accepted. Give another, or another --max-size"
            )


def check_reach(request: ExportRequest, checkpoint: Checkpoint) -> None:
    """Raises `UnsupportedError` where the checkpoint's position tables do not reach the sizes asked for."""
    if request.serving.max_size > checkpoint.max_size:
        raise UnsupportedError(
            f"the checkpoint draws up to {checkpoint.max_size} pixels a side, and {request.serving.max_size} is asked "
            f"for; give --max-size {checkpoint.max_size} or less"
        )
