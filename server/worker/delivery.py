"""The part of a request's time that is not the device's: encoding its images and sending them before its deadline.

A device that works right up to the deadline makes images that arrive too late; under load, all of them do.
"""

from collections import deque
from statistics import median_low

from server.requests import ImageFormat

# Seconds to reach the client: two connections, and the event loops at their ends. On one host 2 to 6 ms were measured
# (docs/performance-log.md, "outside the worker"); the server cannot see the latency between hosts.
TRANSIT = 0.01
RECENT = 9  # images, whose median counts


class Delivery:
    """Seconds between the end of an image's decoding and its arrival. Used only on the event loop's thread."""

    def __init__(self) -> None:
        self._per_pixel: dict[ImageFormat, deque[float]] = {}

    def observe(self, image_format: ImageFormat, pixels: int, seconds: float) -> None:
        """Records that an image of `pixels` pixels was encoded in `seconds`."""
        self._per_pixel.setdefault(image_format, deque(maxlen=RECENT)).append(seconds / pixels)

    def seconds(self, image_format: ImageFormat, pixels: int) -> float:
        """Expected for an image of `pixels` pixels; excludes encoding until one has been observed."""
        recent = self._per_pixel.get(image_format)
        return TRANSIT + (pixels * median_low(recent) if recent else 0.0)
