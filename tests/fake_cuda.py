"""NVIDIA's binding of the CUDA driver over host memory: the calls that shared memory makes, refused as it does."""

import ctypes
import threading
from collections import Counter
from enum import IntEnum
from typing import Any

STRIDE = 1 << 32  # between the addresses of two allocations


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201


OK = (CUresult.CUDA_SUCCESS,)
INVALID = (CUresult.CUDA_ERROR_INVALID_VALUE,)


class CUipcMemHandle:
    def __init__(self) -> None:
        self.value = ctypes.create_string_buffer(64)

    def getPtr(self) -> int:  # noqa: N802 - the binding's name
        return ctypes.addressof(self.value)


class FakeCuda:
    """What other processes have shared on `devices` GPUs, and what of it is open here."""

    CUresult, CUipcMemHandle = CUresult, CUipcMemHandle

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices
        self.shared: dict[bytes, bytearray] = {}
        self.open: dict[int, bytearray] = {}
        self.contexts: Counter[int] = Counter()  # how often each device's is retained
        self.threads: set[str] = set()  # that have made calls
        self.holding = threading.Event()  # cleared, copies wait
        self.holding.set()
        self._current: int | None = None

    def share(self, size: int) -> bytes:
        """The handle of a new allocation of another process, whose bytes count up."""
        handle = bytes([len(self.shared) + 1]) * 64
        self.shared[handle] = bytearray(i % 256 for i in range(size))
        return handle

    def leave(self, handle: bytes) -> None:
        """The process that shared it is gone, and its memory."""
        gone = self.shared.pop(handle)
        self.open = {address: data for address, data in self.open.items() if data is not gone}

    def cuInit(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        self.threads.add(threading.current_thread().name)
        return OK if self.devices else (CUresult.CUDA_ERROR_NO_DEVICE,)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:  # noqa: N802
        return (*OK, self.devices)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:  # noqa: N802
        return (*OK, ordinal)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        self.contexts[device] += 1
        return (*OK, device)

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        self.contexts[device] -= 1
        return OK

    def cuCtxSetCurrent(self, context: int | None) -> tuple[Any, ...]:  # noqa: N802
        self._current = context
        return OK

    def cuCtxSynchronize(self) -> tuple[Any, ...]:  # noqa: N802
        return OK if self._usable() else (CUresult.CUDA_ERROR_INVALID_CONTEXT,)

    def cuIpcOpenMemHandle(self, handle: CUipcMemHandle, flags: int) -> tuple[Any, ...]:  # noqa: N802
        memory = self.shared.get(handle.value.raw)
        if memory is None or flags != 1 or not self._usable():
            return (*INVALID, None)
        address = STRIDE * (1 + max(self.open, default=0) // STRIDE)
        self.open[address] = memory
        return (*OK, address)

    def cuIpcCloseMemHandle(self, address: int) -> tuple[Any, ...]:  # noqa: N802
        return OK if self._usable() and self.open.pop(address, None) is not None else INVALID

    def cuMemGetAddressRange(self, address: int) -> tuple[Any, ...]:  # noqa: N802
        return (*OK, address, len(self.open[address]))

    def cuMemcpyDtoH(self, host: bytearray, address: int, size: int) -> tuple[Any, ...]:  # noqa: N802
        memory = self._range(address, size)
        if memory is None:
            return INVALID
        host[:] = memory
        return OK

    def cuMemcpyHtoD(self, address: int, host: bytes, size: int) -> tuple[Any, ...]:  # noqa: N802
        memory = self._range(address, size)
        if memory is None:
            return INVALID
        memory[:] = host
        return OK

    def _range(self, address: int, size: int) -> memoryview | None:
        self.threads.add(threading.current_thread().name)
        self.holding.wait()
        memory, offset = self.open.get(address - address % STRIDE), address % STRIDE
        if memory is None or offset + size > len(memory) or not self._usable():
            return None
        return memoryview(memory)[offset : offset + size]

    def _usable(self) -> bool:
        return self._current is not None and self.contexts[self._current] > 0
