"""What of a request's time is not the device's: its images have to be encoded and reach the client before its deadline.

A device that works until the deadline draws what nobody gets; with many requests it draws all of them so.
"""

from collections import deque
from statistics import median_low

from server.requests import ImageFormat

# Seconds for the way to the client: two connections, and the event loops at their ends. On one host 2 to 6 ms were
# measured (docs/performance-log.md, "outside the worker"); what is between hosts the server cannot see.
TRANSIT = 0.01
RECENT = 9  # images; their median


class Delivery:
    """Seconds between the end of an image's decoding and its arrival. For the event loop's thread alone."""

    def __init__(self) -> None:
        self._per_pixel: dict[ImageFormat, deque[float]] = {}

    def observe(self, image_format: ImageFormat, pixels: int, seconds: float) -> None:
        """An image of so many `pixels` was encoded in `seconds`."""
        self._per_pixel.setdefault(image_format, deque(maxlen=RECENT)).append(seconds / pixels)

    def seconds(self, image_format: ImageFormat, pixels: int) -> float:
        """What an image of so many `pixels` should take; without encoding until one was seen."""
        recent = self._per_pixel.get(image_format)
        return TRANSIT + (pixels * median_low(recent) if recent else 0.0)
