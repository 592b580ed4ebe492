"""Shared memory that clients register, read and written only within what was registered.

The memory is reached by pread and pwrite, not mapped: a client that shrinks its file then gets an error, where a
mapping would end the server with SIGBUS.
"""

import os
from dataclasses import dataclass, field

from server.errors import AlreadyExistsError, InvalidRequestError, NotFoundError, UnsupportedError, ZServeError

FOLDER = "/dev/shm"  # where Linux keeps what shm_open names
DISABLED = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."


@dataclass
class Region:
    """A range of a POSIX shared memory object."""

    key: str
    offset: int
    byte_size: int
    descriptor: int = field(repr=False)

    @classmethod
    def open(cls, name: str, key: str, offset: int, byte_size: int) -> "Region":
        """Opens the object called `key`, as the client gave it to shm_open."""
        file = key.removeprefix("/")
        if not file or "/" in file or "\0" in file or file in (".", ".."):
            raise InvalidRequestError.of("key", key[:64], "the name of a shared memory object is: /NAME")
        try:
            descriptor = os.open(f"{FOLDER}/{file}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise ZServeError(f"Unable to open shared memory region: '{key[:64]}' ({error.strerror})") from None
        size = os.fstat(descriptor).st_size
        if byte_size == 0 or offset + byte_size > size:
            os.close(descriptor)
            at = "offset" if offset > size else "offset + byte size"
            raise InvalidRequestError(f"Invalid {at} for shared memory region: '{name}' (the object has {size} bytes)")
        return cls(key, offset, byte_size, descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` of the region on; fewer where the memory has shrunk."""
        return os.pread(self.descriptor, size, self.offset + offset)

    def write(self, offset: int, data: bytes) -> None:
        """The opposite of `read`."""
        if os.fstat(self.descriptor).st_size < self.offset + offset + len(data):
            raise ZServeError(f"the shared memory object '{self.key}' has shrunk since it was registered")
        os.pwrite(self.descriptor, data, self.offset + offset)

    def close(self) -> None:
        """Lets go of the memory."""
        os.close(self.descriptor)


class SharedMemory:
    """All registered regions."""

    def __init__(self, *, allowed: bool) -> None:
        self._allowed = allowed
        self._regions: dict[str, Region] = {}

    def extensions(self) -> list[str]:
        """Those of Triton's names that are served."""
        return ["system_shared_memory"] if self._allowed else []

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Adds a range of the object that the client gave to shm_open as `key`."""
        self._check(name)
        self._regions[name] = Region.open(name, key, offset, byte_size)

    def unregister(self, name: str) -> None:
        """Forgets one region, or all of them where `name` is empty."""
        self.check_allowed()
        for known in [name] if name else list(self._regions):
            if known in self._regions:
                self._regions.pop(known).close()

    def status(self, name: str) -> dict[str, Region]:
        """The regions by name: all, or the one asked for."""
        self.check_allowed()
        found = {n: r for n, r in self._regions.items() if name in ("", n)}
        if name and not found:
            raise NotFoundError(f"Unable to find system shared memory region: '{name}'")
        return found

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Regions`."""
        data = self._range(name, offset, size).read(offset, size)
        if len(data) < size:
            raise InvalidRequestError(f"shared memory region '{name}' has shrunk since it was registered")
        return data

    def write(self, name: str, offset: int, data: bytes) -> None:
        """See `Regions`."""
        self._range(name, offset, len(data)).write(offset, data)

    def close(self) -> None:
        """Forgets everything."""
        while self._regions:
            self._regions.popitem()[1].close()

    def _range(self, name: str, offset: int, size: int) -> Region:
        self.check_allowed()
        region = self._regions.get(name)
        if region is None:
            raise NotFoundError(f"Unable to find shared memory region: '{name}'")
        if offset > region.byte_size:
            raise InvalidRequestError(f"Invalid offset for shared memory region: '{name}'")
        if offset + size > region.byte_size:
            raise InvalidRequestError(f"Invalid offset + byte size for shared memory region: '{name}'")
        return region

    def _check(self, name: str) -> None:
        self.check_allowed()
        if not name:
            raise InvalidRequestError.of("name", name, "a name for the region is")
        if name in self._regions:
            raise AlreadyExistsError(f"shared memory region '{name}' already in manager")

    def check_allowed(self) -> None:
        """Raises UnsupportedError unless the server was started with --allow-client-shm."""
        if not self._allowed:
            raise UnsupportedError(DISABLED)
