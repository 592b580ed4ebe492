"""A client's POSIX shared memory.

It is accessed by pread and pwrite, not mapped: a client that shrinks its file then gets an error, where a mapping would
end the server with SIGBUS. Both only copy memory, so they run on the event loop.
"""

import os
from dataclasses import dataclass, field
from typing import ClassVar

from server.errors import InvalidRequestError, ZServeError

FOLDER = "/dev/shm"  # where Linux keeps what shm_open names


@dataclass(frozen=True)
class SystemRegion:
    """A range of a POSIX shared memory object."""

    kind: ClassVar[str] = "system"

    key: str
    offset: int
    byte_size: int
    descriptor: int = field(repr=False)

    @classmethod
    async def open(cls, name: str, key: str, offset: int, byte_size: int) -> "SystemRegion":
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

    async def read(self, offset: int, size: int) -> bytes:
        """See `Region`."""
        return os.pread(self.descriptor, size, self.offset + offset)

    async def write(self, offset: int, data: bytes) -> None:
        """See `Region`."""
        if os.fstat(self.descriptor).st_size < self.offset + offset + len(data):
            raise ZServeError(f"the shared memory object '{self.key}' has shrunk since it was registered")
        try:
            written = os.pwrite(self.descriptor, data, self.offset + offset)
        except OSError as error:
            raise ZServeError(f"the shared memory object '{self.key}' cannot be written ({error.strerror})") from None
        if written < len(data):  # pages not written before are allocated now, and there may be no room for them
            raise ZServeError(f"the shared memory object '{self.key}' cannot be written (no room for all of it)")

    async def close(self) -> None:
        """See `Region`."""
        os.close(self.descriptor)
