"""A client's GPU memory, opened here by its IPC handle.

The driver's calls block, and the first on a device takes some 0.3 s: one thread makes them all, in order, so no memory
is closed during a copy. The context is the device's primary one, which the driver reference-counts: every region
retains it, and with the last region it is freed, along with the memory that it takes.
"""

import asyncio
import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from server.errors import InvalidRequestError, UnsupportedError, ZServeError

log = logging.getLogger(__name__)

T = TypeVar("T")

HANDLE_BYTES = 64  # of a cudaIpcMemHandle_t
LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, without which no handle is opened


class Driver:
    """NVIDIA's binding of the driver, whose functions return a status first."""

    def __init__(self, binding: Any) -> None:
        self._binding = binding

    def call(self, function: str, *arguments: Any) -> Any:
        """What the function returns after its status.

        Raises:
            ZServeError: the status is not success.
        """
        status, *values = getattr(self._binding, function)(*arguments)
        if status != self._binding.CUresult.CUDA_SUCCESS:
            raise ZServeError(f"{function}: {status.name}")
        return values[0] if len(values) == 1 else values

    def open_handle(self, handle: bytes) -> int:
        """The address of the allocation that another process exported as `handle`."""
        wanted = self._binding.CUipcMemHandle()
        ctypes.memmove(wanted.getPtr(), handle, HANDLE_BYTES)  # not all versions have an attribute for its bytes
        return int(self.call("cuIpcOpenMemHandle", wanted, LAZY_PEER_ACCESS))


def load_driver() -> Driver:
    """The driver, ready to use.

    Raises:
        UnsupportedError: the binding, the driver or a GPU is missing; says which, and what to do.
    """
    try:
        from cuda.bindings import driver as binding
    except ImportError as error:
        remedy = "pip install 'zserve[cuda-shared-memory]'"
        raise UnsupportedError(f"CUDA shared memory needs NVIDIA's cuda-bindings ({error}): {remedy}") from None
    try:
        driver = Driver(binding)
        driver.call("cuInit", 0)
    except (ZServeError, RuntimeError) as error:  # RuntimeError: the driver's library is missing
        raise UnsupportedError(f"CUDA shared memory needs an NVIDIA GPU and its driver ({error})") from None
    return driver


@dataclass(frozen=True)
class CudaRegion:
    """The first bytes of another process's allocation."""

    kind: ClassVar[str] = "CUDA"

    name: str
    device_id: int
    byte_size: int
    memory: "CudaMemory" = field(repr=False)
    context: Any = field(repr=False)
    address: int = field(repr=False)
    held: ExitStack = field(repr=False)  # the handle and the context, to be released

    async def read(self, offset: int, size: int) -> bytes:
        """See `Region`."""
        return await self.memory.run(self._read, offset, size)

    async def write(self, offset: int, data: bytes) -> None:
        """See `Region`."""
        await self.memory.run(self._write, offset, data)

    async def close(self) -> None:
        """See `Region`."""
        try:
            await self.memory.run(self._close)
        except ZServeError as error:  # the client may have gone, and the region is forgotten anyway
            log.warning("closing CUDA shared memory region '%s': %s", self.name, error)

    def _read(self, driver: Driver, offset: int, size: int) -> bytes:
        data = bytearray(size)
        self._copy(driver, "cuMemcpyDtoH", data, self.address + offset, size)
        return bytes(data)

    def _write(self, driver: Driver, offset: int, data: bytes) -> None:
        self._copy(driver, "cuMemcpyHtoD", self.address + offset, data, len(data))

    def _copy(self, driver: Driver, function: str, *arguments: Any) -> None:
        try:
            driver.call("cuCtxSetCurrent", self.context)
            driver.call(function, *arguments)
            driver.call("cuCtxSynchronize")  # a copy to the device may return once its data is only staged
        except ZServeError as error:
            raise ZServeError(f"failed to copy CUDA shared memory region '{self.name}': {error}") from None

    def _close(self, driver: Driver) -> None:
        with self.held:
            driver.call("cuCtxSetCurrent", self.context)


class CudaMemory:
    """Opens regions, on the thread that makes all driver calls; the driver is loaded when it is first needed."""

    def __init__(self, load: Callable[[], Driver] = load_driver) -> None:
        self._load = load
        self._thread = ThreadPoolExecutor(1, "cuda-shared-memory")

    async def available(self) -> bool:
        """Whether there are a driver and a GPU."""
        try:
            await self.run(lambda driver: driver)
        except UnsupportedError:
            return False
        return True

    async def open(self, name: str, handle: bytes, device_id: int, byte_size: int) -> CudaRegion:
        """Opens the first `byte_size` bytes of the allocation that the client got `handle` for."""
        return await self.run(self._open, name, handle, device_id, byte_size)

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Returns the result of `work` on the driver and the arguments, run on the thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: work(self._driver, *arguments))

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    @cached_property
    def _driver(self) -> Driver:
        return self._load()

    def _open(self, driver: Driver, name: str, handle: bytes, device_id: int, byte_size: int) -> CudaRegion:
        count = driver.call("cuDeviceGetCount")
        if not 0 <= device_id < count:
            raise InvalidRequestError.of("device_id", device_id, f"0 to {count - 1} is")
        if len(handle) != HANDLE_BYTES:
            accepted = f"the {HANDLE_BYTES} bytes of a cudaIpcMemHandle_t are"
            raise InvalidRequestError.of("raw_handle", f"{len(handle)} bytes", accepted)
        with ExitStack() as undo:
            device = driver.call("cuDeviceGet", device_id)
            context = driver.call("cuDevicePrimaryCtxRetain", device)
            undo.callback(driver.call, "cuDevicePrimaryCtxRelease", device)
            driver.call("cuCtxSetCurrent", context)
            undo.callback(driver.call, "cuCtxSetCurrent", None)
            address = _opened(driver, name, handle)
            undo.callback(driver.call, "cuIpcCloseMemHandle", address)
            _check_size(driver, name, address, byte_size)
            return CudaRegion(name, device_id, byte_size, self, context, address, undo.pop_all())


def _opened(driver: Driver, name: str, handle: bytes) -> int:
    try:
        return driver.open_handle(handle)
    except ZServeError as error:
        text = f"failed to register shared memory region '{name}': failed to open CUDA IPC handle: {error}"
        raise InvalidRequestError(text) from None


def _check_size(driver: Driver, name: str, address: int, byte_size: int) -> None:
    base, size = driver.call("cuMemGetAddressRange", address)
    there = int(base) + size - address
    if not 1 <= byte_size <= there:
        text = f"failed to register shared memory region '{name}': invalid args (byte_size {byte_size} of {there})"
        raise InvalidRequestError(text)
