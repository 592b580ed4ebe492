"""Shared memory that clients register; both kinds share one namespace."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from server.errors import AlreadyExistsError, InvalidRequestError, NotFoundError, UnsupportedError
from server.rpc.triton.cuda_memory import CudaMemory
from server.rpc.triton.regions import Place, Region
from server.rpc.triton.system_memory import SystemRegion

PIECE = 4 << 20  # bytes copied at a time; the event loop has its turn after each piece
DISABLED = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."

R = TypeVar("R", bound=Region)


class SharedMemory:
    """All registered regions; nothing outside what was registered is ever read or written."""

    def __init__(self, *, allowed: bool, cuda: CudaMemory | None = None) -> None:
        self._allowed = allowed
        self._cuda = cuda or CudaMemory()
        self._regions: dict[str, Region] = {}
        self._changing = asyncio.Lock()  # held while a region is opened or closed

    async def extensions(self) -> list[str]:
        """The shared memory extensions that are served, by Triton's names."""
        if not self._allowed:
            return []
        return ["system_shared_memory", *(["cuda_shared_memory"] if await self._cuda.available() else [])]

    async def register_system(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Adds a range of the object that the client gave to shm_open as `key`."""
        await self._register(name, partial(SystemRegion.open, name, key, offset, byte_size))

    async def register_cuda(self, name: str, handle: bytes, device_id: int, byte_size: int) -> None:
        """Adds the start of the GPU allocation that the client got `handle` for."""
        await self._register(name, partial(self._cuda.open, name, handle, device_id, byte_size))

    async def unregister(self, kind: type[Region], name: str) -> None:
        """Forgets one region, or all of the kind where `name` is empty.

        Continues if the client goes away, as what is no more in the list must be closed.
        """
        self.check_allowed()
        await asyncio.shield(self._remove(kind, name))

    def status(self, kind: type[R], name: str) -> dict[str, R]:
        """The regions of a kind by name: all, or the one asked for."""
        self.check_allowed()
        found = self._of(kind, name)
        if not name or found:
            return found
        other = self._regions.get(name)
        if other is None:
            raise NotFoundError(f"Unable to find {kind.kind.lower()} shared memory region: '{name}'")
        raise NotFoundError(
            f"The region named '{name}' is registered as {other.kind} shared memory, not {kind.kind} shared memory"
        )

    def check(self, place: Place) -> None:
        """Raises what reading or writing `place` would."""
        self._region(place)

    async def read(self, place: Place) -> bytes:
        """All bytes of the range."""
        pieces = []
        async for begin, end in _pieces(place.size):
            data = await self._region(place).read(place.offset + begin, end - begin)
            if len(data) < end - begin:
                raise InvalidRequestError(f"shared memory region '{place.region}' has shrunk since it was registered")
            pieces.append(data)
        return b"".join(pieces)

    async def write(self, place: Place, data: bytes) -> None:
        """Puts `data` at the start of the range."""
        async for begin, end in _pieces(len(data)):
            await self._region(place).write(place.offset + begin, data[begin:end])

    async def close(self) -> None:
        """Forgets everything."""
        async with self._changing:
            while self._regions:
                await self._regions.popitem()[1].close()
        self._cuda.close()

    def check_allowed(self) -> None:
        """Raises UnsupportedError unless the server was started with --allow-client-shm."""
        if not self._allowed:
            raise UnsupportedError(DISABLED)

    async def _register(self, name: str, opening: Callable[[], Awaitable[Region]]) -> None:
        """Registers a region; continues if the client goes away, as what has been opened must be in the list."""
        self.check_allowed()
        if not name:
            raise InvalidRequestError.of("name", name, "a name for the region is")
        await asyncio.shield(self._add(name, opening))

    async def _add(self, name: str, opening: Callable[[], Awaitable[Region]]) -> None:
        async with self._changing:
            if name in self._regions:
                raise AlreadyExistsError(f"shared memory region '{name}' already in manager")
            self._regions[name] = await opening()

    async def _remove(self, kind: type[Region], name: str) -> None:
        async with self._changing:
            for known in self._of(kind, name):
                await self._regions.pop(known).close()

    def _of(self, kind: type[R], name: str) -> dict[str, R]:
        return {n: r for n, r in self._regions.items() if isinstance(r, kind) and name in ("", n)}

    def _region(self, place: Place) -> Region:
        """The region that the range lies in."""
        self.check_allowed()
        region = self._regions.get(place.region)
        if region is None:
            raise NotFoundError(f"Unable to find shared memory region: '{place.region}'")
        if place.offset >= region.byte_size:
            raise InvalidRequestError(f"Invalid offset for shared memory region: '{place.region}'")
        if place.offset + place.size > region.byte_size:
            raise InvalidRequestError(f"Invalid offset + byte size for shared memory region: '{place.region}'")
        return region


async def _pieces(size: int) -> AsyncIterator[tuple[int, int]]:
    """Where each piece begins and ends. A region may be unregistered between two of them, so look it up for each."""
    for begin in range(0, size, PIECE):
        if begin:
            await asyncio.sleep(0)
        yield begin, min(begin + PIECE, size)
