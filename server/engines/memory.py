"""Allocated, free and reserved memory: for reports by stage, and for the error when it runs out."""

import resource

import psutil
import torch

from server.errors import DeviceMemoryError

MIB = 1 << 20
_outside_torch = {"now": 0, "peak": 0}


def add_outside_torch(size: int) -> None:
    """Accounts for device memory that a library holds outside torch's allocator; negative when it is freed."""
    _outside_torch["now"] += size
    _outside_torch["peak"] = max(_outside_torch.values())


def host_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def host_peak_bytes() -> int:
    """The most this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _on_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def device_bytes() -> int:
    """Memory on the CUDA device reserved by torch, plus what engines hold outside it; 0 before CUDA is used."""
    return torch.cuda.memory_reserved() + _outside_torch["now"] if _on_cuda() else 0


def device_peak_bytes() -> int:
    """At most this much has been held there: torch's peak plus the engines', which need not coincide."""
    return torch.cuda.max_memory_reserved() + _outside_torch["peak"] if _on_cuda() else 0


def refusals() -> int:
    """How often torch's allocator has run out of memory on the CUDA device; 0 before CUDA is used."""
    return int(torch.cuda.memory_stats().get("num_ooms", 0)) if _on_cuda() else 0


# Messages about host memory, which has no exception of its own: torch's, and what ONNX Runtime passes on by platform.
_REFUSED = ("can't allocate memory", "bad_alloc", "bad allocation", "Failed to allocate memory")


def host_refused(error: Exception) -> bool:
    """Whether `error` is how a library reports that the host had no memory."""
    return any(text in str(error) for text in _REFUSED)


def out_of_memory_error(error: torch.OutOfMemoryError) -> DeviceMemoryError:
    """The answer to a request that did not fit, with the figures from before anything is freed."""
    return DeviceMemoryError(
        f"not enough memory for this request ({figures()}); ask for a smaller size or fewer images, or try again "
        f"when less is running. The allocator said: {str(error).splitlines()[0][:200]}"
    )


def figures() -> str:
    """Allocated, reserved and free memory, of the device where there is one."""
    if _on_cuda():
        free, total = torch.cuda.mem_get_info()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return (
            f"device: {allocated // MIB} MiB allocated, {reserved // MIB} MiB reserved, "
            f"{free // MIB} MiB free of {total // MIB} MiB"
        )
    memory = psutil.virtual_memory()
    return (
        f"host: {host_bytes() // MIB} MiB allocated by this worker, 0 MiB reserved, "
        f"{memory.available // MIB} MiB free of {memory.total // MIB} MiB"
    )
