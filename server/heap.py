"""How the processes of the server keep the memory of images that have passed through them.

By default glibc returns an image's memory to the system as soon as it is freed, and every page of it is faulted in
anew for the next image. For raw 1024x1024 images that was two thirds of what the frontend spent on them.
"""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
KEPT = 256 << 20  # bytes of free memory that the process keeps at most
LARGEST = 32 << 20  # bytes; the most that glibc lets a block have that comes from the heap


def keep_freed_memory(arenas: int) -> None:
    """To be called before there are threads; does nothing where the C library is not glibc.

    `arenas`: how many heaps the threads share. By default each has its own, up to 8 a core.
    """
    library = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        library.mallopt(M_ARENA_MAX, arenas)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)
