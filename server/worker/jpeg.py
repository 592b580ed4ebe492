"""JPEG in strips, which several threads can encode at once.

A strip is a whole number of block rows high, so its blocks are coded as in the whole picture. Concatenated with restart
markers between them, coded strips form one baseline file of the same pixels (ITU-T T.81, B.2 and F.1.2).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

BLOCK = 16  # pixels a side, with chroma at half the resolution
MOST = 4  # strips
LEAST = 128 * 1024  # pixels in a strip; fewer are not worth handing to another thread
MOST_BLOCKS = 0xFFFF  # between two restart markers
START, END = b"\xff\xd8", b"\xff\xd9"
FRAME, SCAN, INTERVAL, RESTART = b"\xff\xc0", b"\xff\xda", b"\xff\xdd\x00\x04", 0xD0


def strips(pixels: Pixels) -> list[Pixels]:
    """`pixels` [H, W, 3] cut from top to bottom into strips of equal height; only the last may be lower."""
    height, width, _ = pixels.shape
    rows = _rows(height, width)
    return [pixels[top : top + rows] for top in range(0, height, rows)]


def encode(pixels: Pixels, quality: int) -> bytes:
    """A complete JPEG file of a picture or a strip."""
    # Not with Pillow, which holds the interpreter's lock while it encodes and so keeps the device waiting.
    file: bytes = simplejpeg.encode_jpeg(pixels, quality, "RGB", "420", fastdct=False)
    return file


def joined(files: Sequence[bytes], height: int, width: int) -> bytes:
    """Joins the files of all strips of a `height` x `width` picture, in order, into one."""
    parts = [START]
    for segment in _segments(files[0]):
        if segment.startswith(SCAN) and len(files) > 1:
            blocks = -(-width // BLOCK) * (_rows(height, width) // BLOCK)
            parts.append(INTERVAL + blocks.to_bytes(2))
        # A frame's height follows its marker, length and precision.
        parts.append(segment[:5] + height.to_bytes(2) + segment[7:] if segment.startswith(FRAME) else segment)
    for number, file in enumerate(files):
        if number:
            parts.append(bytes((0xFF, RESTART + (number - 1) % 8)))
        parts.append(file[len(START) + sum(map(len, _segments(file))) : -len(END)])
    return b"".join([*parts, END])


def _rows(height: int, width: int) -> int:
    """Pixel rows in a strip."""
    count = max(1, min(MOST, height * width // LEAST))
    most = MOST_BLOCKS // -(-width // BLOCK) * BLOCK
    return min(most, -(-height // (BLOCK * count)) * BLOCK)


def _segments(file: bytes) -> Iterator[bytes]:
    """The segments before the coded blocks, with their markers."""
    at, marker = len(START), b""
    while marker != SCAN:
        marker, length = file[at : at + 2], int.from_bytes(file[at + 2 : at + 4])
        yield file[at : at + 2 + length]
        at += 2 + length
