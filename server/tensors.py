"""A model seen as tensors: its signature, a request, its responses. No wire types, no arrays: data stays bytes."""

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

from server.errors import InvalidRequestError


class DataType(StrEnum):
    """Triton's names of element types."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    BF16 = "BF16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"

    @property
    def size(self) -> int:
        """Bytes of one element; 0 for BYTES, whose elements carry their own length."""
        return _SIZES[self]

    @property
    def code(self) -> str:
        """The `struct` format character of one element; empty for BF16 and BYTES, which have none."""
        return _CODES[self]


_SIZES = dict(zip(DataType, (1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 0), strict=True))

_CODES = dict(zip(DataType, ("?", "B", "H", "I", "Q", "b", "h", "i", "q", "e", "", "f", "d", ""), strict=True))

Parameter = bool | int | float | str


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model; -1 stands for any size, and the batch dimension is not among `dims`."""

    name: str
    datatype: DataType
    dims: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """The signature of one version of a model."""

    name: str
    version: str
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0  # 0: shapes have no batch dimension
    decoupled: bool = False  # any number of responses to a request, in any order

    def batched(self, dims: tuple[int, ...]) -> tuple[int, ...]:
        """`dims` as a request has to send them."""
        return (-1, *dims) if self.max_batch_size else dims


@dataclass(frozen=True)
class Tensor:
    """Elements are little-endian and row-major; each of BYTES is preceded by its length in four bytes."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    data: bytes

    def strings(self) -> list[bytes]:
        """The elements of a BYTES tensor."""
        return list(split_strings(self.data))

    def values(self) -> list[Any]:
        """The elements as Python values, those of BYTES as text."""
        match self.datatype:
            case DataType.BYTES:
                return [element.decode(errors="replace") for element in self.strings()]
            case DataType.BF16:  # the upper half of an FP32
                return [v for (v,) in struct.iter_unpack("<f", b"".join(b"\0\0" + e for e in _pairs(self.data)))]
            case _:
                return list(struct.unpack(f"<{element_count(self.shape)}{self.datatype.code}", self.data))


class Delivery(Enum):
    """How many responses the caller can take."""

    ONE = "one"
    MANY = "many"


@dataclass(frozen=True)
class InferRequest:
    """A request whose tensors fit the model's signature."""

    model: ModelSpec
    id: str
    inputs: Mapping[str, Tensor]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    priority: int = 0  # 1 is the highest, 0 the model's default
    queue_timeout: float | None = None  # seconds it may wait
    timeout: float | None = None  # seconds left of the call
    delivery: Delivery = Delivery.ONE
    room: Mapping[str, int] = field(default_factory=dict)  # bytes by output, of those that go to the caller's memory

    @property
    def batch_size(self) -> int:
        """Rows along the batch dimension; 1 where the model has none."""
        if not self.model.max_batch_size:
            return 1
        return next((t.shape[0] for t in self.inputs.values()), 1)

    def check_room(self, output: str, size: int) -> None:
        """For models that know the size of an output before they compute it.

        Raises:
            InvalidRequestError: the caller has no room for `size` bytes of `output`.
        """
        room = self.room.get(output, size)
        if size > room:
            raise InvalidRequestError(
                f"shared memory size specified with the request for output '{output}' ({room} bytes) should be at "
                f"least {size} bytes to hold the results"
            )


@dataclass(frozen=True)
class InferResponse:
    """One response; a final one without outputs only says that nothing more follows."""

    outputs: tuple[Tensor, ...] = ()
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    final: bool = True


def element_count(shape: Iterable[int]) -> int:
    """Elements of a tensor of `shape`."""
    return math.prod(shape)


def join_strings(elements: Iterable[bytes]) -> bytes:
    """The data of a BYTES tensor."""
    return b"".join(struct.pack("<I", len(e)) + e for e in elements)


def _pairs(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 2] for at in range(0, len(data), 2))


def split_strings(data: bytes) -> Iterator[bytes]:
    """The inverse of `join_strings`; see `string_places`."""
    return (data[begin:end] for begin, end in string_places(data))


def string_places(data: bytes) -> Iterator[tuple[int, int]]:
    """Where in the data of a BYTES tensor each element begins and ends.

    Raises:
        ValueError: a length is cut off, or exceeds the data left.
    """
    at = 0
    while at < len(data):
        if at + 4 > len(data):
            raise ValueError("incomplete string length indicator")
        (length,) = struct.unpack_from("<I", data, at)
        if at + 4 + length > len(data):
            raise ValueError(f"incomplete string data: {length} bytes announced, {len(data) - at - 4} left")
        yield at + 4, at + 4 + length
        at += 4 + length
