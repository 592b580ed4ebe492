"""The heap of the server's processes: what C has freed is kept, and what Python has loaded is not scanned again.

By default glibc returns an image's memory to the system as soon as it is freed, and every page of it is faulted in
again for the next image. For raw 1024x1024 images that was two thirds of what the frontend spent on them.

A full Python garbage collection scans every object there is, most of which are torch's, diffusers' and transformers'
modules: with the GIL held, 110 ms in a worker on a CPU, 180 to 310 ms beside an H100. The device waits.
"""

import atexit
import contextlib
import ctypes
import gc

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
KEPT = 256 << 20  # bytes of free memory that the process may keep
LARGEST = 32 << 20  # bytes; glibc's limit on the size of a block that comes from the heap


def keep_freed_memory(arenas: int) -> None:
    """To be called before any thread is started; does nothing if the C library is not glibc.

    `arenas`: how many heaps the threads share. By default each has its own, up to 8 per core.
    """
    library = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        library.mallopt(M_ARENA_MAX, arenas)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


def settle() -> None:
    """To be called when everything is loaded: frees garbage, and excludes the rest from later collections."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # for the last collection, after which extensions complain about what is left
