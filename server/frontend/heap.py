"""How the process keeps the memory of images that have passed through it.

By default glibc returns an image's memory to the system as soon as it is freed, and every page of it is faulted in
anew for the next image. For raw 1024x1024 images that was two thirds of what this process spent on them.
"""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
KEPT = 256 << 20  # bytes of free memory that the process keeps at most
LARGEST = 32 << 20  # bytes; the most that glibc lets a block have that comes from the heap


def keep_freed_memory() -> None:
    """To be called before there are threads; does nothing where the C library is not glibc."""
    library = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        library.mallopt(M_ARENA_MAX, 1)  # else every thread keeps its own
        library.mallopt(M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)
