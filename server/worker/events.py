"""What the loop reports about a request, on the loop's own thread."""

from collections.abc import Callable
from dataclasses import dataclass

from server.requests import Progress, Queued
from server.worker.images import Pixels
from server.worker.sequences import ImageSequence


@dataclass(frozen=True)
class SequenceStarted:
    """The first stage of a sequence is about to run. `at`: when, by the loop's clock in seconds."""

    at: float


@dataclass(frozen=True)
class PreviewPixels:
    """A preview, not yet encoded."""

    step: int
    image_index: int
    pixels: Pixels


@dataclass(frozen=True)
class FinishedImage:
    """A finished image, not yet encoded, with everything its sequence went through."""

    sequence: ImageSequence
    pixels: Pixels


@dataclass(frozen=True)
class Failed:
    """The request cannot be finished; nothing follows."""

    error: Exception


LoopEvent = Queued | SequenceStarted | Progress | PreviewPixels | FinishedImage | Failed
Listener = Callable[[LoopEvent], None]
