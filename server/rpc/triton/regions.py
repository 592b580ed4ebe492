"""Ranges of shared memory, as inputs and outputs name them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from server.errors import InvalidRequestError

REGION, REGION_SIZE, REGION_OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"


@dataclass(frozen=True)
class Place:
    """A range of a shared memory region."""

    region: str
    offset: int
    size: int


class Region(Protocol):
    """A client's memory that this server has open."""

    kind: ClassVar[str]  # as Triton calls it

    @property
    def byte_size(self) -> int:
        """How much of it was registered."""

    async def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` in the region; fewer if the memory has shrunk."""

    async def write(self, offset: int, data: bytes) -> None:
        """Writes `data` at `offset` in the region."""

    async def close(self) -> None:
        """Lets go of the memory."""


def read_place(parameters: Mapping[str, Any], what: str) -> Place:
    """The range of shared memory that an input or output names."""
    size = parameters[REGION_SIZE].int64_param if REGION_SIZE in parameters else 0
    offset = parameters[REGION_OFFSET].int64_param if REGION_OFFSET in parameters else 0
    if size <= 0 or offset < 0:
        raise InvalidRequestError(
            f"'{REGION_SIZE}' of {what} must be specified as an int64_param above 0, and '{REGION_OFFSET}' not below 0"
        )
    return Place(parameters[REGION].string_param, offset, size)
