"""The inputs of a Triton request, checked against the model's signature.

A tensor of text may hold millions of elements. Python work on each of them is done in pieces, between which the event
loop has its turn; unlike work in a thread, it ends with the call that it is for.
"""

import asyncio
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from server.errors import InvalidRequestError
from server.rpc.images import MAX_MESSAGE_BYTES
from server.rpc.triton.regions import REGION, Place, read_place
from server.rpc.triton.shared_memory import SharedMemory
from server.tensors import DataType, ModelSpec, Tensor, TensorSpec, element_count, join_strings, string_places

PIECE = 8192  # elements between two turns of the event loop: a few milliseconds
BATCH_NOTE = (
    " NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
# The field that holds typed contents, by data type. 16-bit floats have none.
TYPED = {
    DataType.BOOL: "bool_contents",
    DataType.INT8: "int_contents",
    DataType.INT16: "int_contents",
    DataType.INT32: "int_contents",
    DataType.INT64: "int64_contents",
    DataType.UINT8: "uint_contents",
    DataType.UINT16: "uint_contents",
    DataType.UINT32: "uint_contents",
    DataType.UINT64: "uint64_contents",
    DataType.FP32: "fp32_contents",
    DataType.FP64: "fp64_contents",
    DataType.BYTES: "bytes_contents",
}


async def decode_inputs(message: pb.ModelInferRequest, spec: ModelSpec, regions: SharedMemory) -> dict[str, Tensor]:
    """The inputs by name.

    Raises:
        InvalidRequestError: they do not fit the signature.
    """
    return await _Inputs(message, spec, regions).decode()


class _Inputs:
    """Reads the inputs of one message."""

    def __init__(self, message: pb.ModelInferRequest, spec: ModelSpec, regions: SharedMemory) -> None:
        self._message, self._spec, self._regions = message, spec, regions
        self._where = f"for model '{spec.name}'"
        self._prefix = f"[request id: {message.id or '<id_unknown>'}] "
        self._specs = {t.name: t for t in spec.inputs}
        self._raw: Iterator[bytes] = iter(message.raw_input_contents)

    async def decode(self) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        for item in self._message.inputs:
            if item.name not in self._specs:
                raise InvalidRequestError(
                    f"unexpected inference input '{item.name}' {self._where}; {', '.join(self._specs)} are known"
                )
            if item.name in inputs:
                raise self._error(f"input '{item.name}' already exists in request")
            inputs[item.name] = await self._tensor(item, self._specs[item.name])
        left = sum(1 for _ in self._raw)
        if left:
            raise InvalidRequestError(
                f"{left} entries of raw_input_contents are left over {self._where}; one an input is accepted"
            )
        self._check_complete(inputs)
        self._check_batch(inputs)
        return inputs

    async def _tensor(self, item: Any, spec: TensorSpec) -> Tensor:
        if item.datatype != spec.datatype:
            raise self._error(
                f"inference input '{spec.name}' data-type is '{item.datatype}', but model '{self._spec.name}' expects "
                f"'{spec.datatype}'"
            )
        shape = tuple(item.shape)
        self._check_shape(shape, spec)
        tensor = Tensor(spec.name, spec.datatype, shape, await self._data(item, spec))
        if tensor.datatype is DataType.BYTES:
            await self._check_strings(tensor)
        else:
            self._check_size(spec, shape, len(tensor.data))
        return tensor

    def _check_shape(self, shape: tuple[int, ...], spec: TensorSpec) -> None:
        if any(d < 0 for d in shape):
            raise self._error(
                f"All input dimensions should be specified for input '{spec.name}' {self._where}, got {_list(shape)}"
            )
        if self._spec.max_batch_size and not shape:
            raise self._error(f"input '{spec.name}' has no shape but model requires batch dimension {self._where}")
        expected = self._spec.batched(spec.dims)
        if len(expected) != len(shape) or any(e not in (-1, g) for e, g in zip(expected, shape, strict=True)):
            note = BATCH_NOTE if self._spec.max_batch_size else ""
            raise self._error(
                f"unexpected shape for input '{spec.name}' {self._where}. Expected {_list(expected)}, "
                f"got {_list(shape)}.{note}"
            )

    async def _data(self, item: Any, spec: TensorSpec) -> bytes:
        if REGION in item.parameters:
            place = read_place(item.parameters, f"input '{spec.name}'")
            self._check_place(place, item, spec)
            return await self._regions.read(place)
        if not self._message.raw_input_contents:
            return await self._typed(item, spec)
        if item.HasField("contents") and item.contents.ListFields():
            raise InvalidRequestError(
                f"contents field must not be specified when using raw_input_contents for '{spec.name}' {self._where}"
            )
        data = next(self._raw, None)
        if data is None:
            raise self._no_data(spec)
        return data

    def _check_place(self, place: Place, item: Any, spec: TensorSpec) -> None:
        """Checks before reading: a region may be larger than any memory, as its pages exist only once written."""
        self._regions.check(place)
        if spec.datatype is not DataType.BYTES:
            self._check_size(spec, item.shape, place.size)
        if place.size > MAX_MESSAGE_BYTES:
            raise self._error(
                f"input '{spec.name}' has {place.size} bytes in shared memory; as in a message, at most "
                f"{MAX_MESSAGE_BYTES} are accepted"
            )

    async def _typed(self, item: Any, spec: TensorSpec) -> bytes:
        """The elements of the typed contents, packed."""
        present = [f.name for f, _ in item.contents.ListFields()]
        if not present:
            if spec.datatype in TYPED and 0 in item.shape:
                return b""
            raise self._no_data(spec)
        field = TYPED.get(spec.datatype, "")
        if present != [field]:
            found = next(d for d, name in TYPED.items() if name in present and name != field)
            raise InvalidRequestError(
                f"unexpected explicit tensor data for input tensor '{spec.name}' {self._where} of type '{found}', "
                f"expected datatype '{spec.datatype}'"
            )
        values = getattr(item.contents, field)
        if spec.datatype is DataType.BYTES:
            self._check_string_count(spec.name, len(values), element_count(item.shape))
            return await _packed(values, join_strings)
        try:
            return await _packed(values, lambda piece: struct.pack(f"<{len(piece)}{spec.datatype.code}", *piece))
        except (struct.error, OverflowError) as error:
            raise self._error(f"input '{spec.name}': a value does not fit into {spec.datatype} ({error})") from None

    def _check_size(self, spec: TensorSpec, shape: Sequence[int], got: int) -> None:
        expected = element_count(shape) * spec.datatype.size
        if got != expected:
            raise self._error(
                f"input byte size mismatch for input '{spec.name}' {self._where}. Expected {expected}, got {got}"
            )

    async def _check_strings(self, tensor: Tensor) -> None:
        """Looks no further than one element past those that the shape announces."""
        count = element_count(tensor.shape)
        places = islice(string_places(tensor.data), min(count, len(tensor.data)) + 1)
        got = 0
        try:
            while piece := sum(1 for _ in islice(places, PIECE)):
                got += piece
                if piece == PIECE:
                    await asyncio.sleep(0)
        except ValueError as error:
            raise InvalidRequestError(f"{error} for inference input '{tensor.name}' {self._where}") from None
        self._check_string_count(tensor.name, got, count)

    def _check_string_count(self, name: str, got: int, expected: int) -> None:
        if got != expected:
            found = "more" if got > expected else got
            raise InvalidRequestError(
                f"expected {expected} string elements for inference input '{name}' {self._where}, got {found}"
            )

    def _check_complete(self, inputs: Mapping[str, Tensor]) -> None:
        required = [t.name for t in self._spec.inputs if not t.optional]
        missing = [name for name in required if name not in inputs]
        if not missing:
            return
        high = len(self._spec.inputs)
        expected = (
            f"expected {high} inputs but got {len(inputs)} inputs {self._where}"
            if len(required) == high
            else f"expected number of inputs between {len(required)} and {high} but got {len(inputs)} inputs "
            f"{self._where}"
        )
        raise self._error(
            f"{expected}. Got input(s) {list(inputs)}, but missing required input(s) {missing}. "
            "Please provide all required input(s)."
        )

    def _check_batch(self, inputs: Mapping[str, Tensor]) -> None:
        most = self._spec.max_batch_size
        if not most or not inputs:
            return
        first = next(iter(inputs.values())).shape[0]
        for tensor in inputs.values():
            if tensor.shape[0] != first:
                raise self._error(
                    f"input '{tensor.name}' batch size does not match other inputs for '{self._spec.name}'"
                )
        if not 1 <= first <= most:
            raise self._error(f"inference request batch-size must be <= {most} for '{self._spec.name}', got {first}")

    def _no_data(self, spec: TensorSpec) -> InvalidRequestError:
        return InvalidRequestError(f"unable to find data for input tensor '{spec.name}' {self._where} in request.")

    def _error(self, text: str) -> InvalidRequestError:
        return InvalidRequestError(self._prefix + text)


async def _packed(values: Sequence[Any], pack: Callable[[Sequence[Any]], bytes]) -> bytes:
    """All `values` as bytes."""
    if len(values) <= PIECE:
        return pack(values)
    pieces = []
    for at in range(0, len(values), PIECE):
        pieces.append(pack(values[at : at + PIECE]))
        await asyncio.sleep(0)
    return b"".join(pieces)


def _list(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"
