"""Inputs that are large, or are said to be: what is read of them, and who has to wait for it."""

import asyncio
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from server.config import ModelConfig
from server.errors import InvalidRequestError, NotFoundError, ZServeError
from server.requests import Completed, Image, ImageFormat, Timings
from server.rpc.triton import shared_memory
from server.rpc.triton.image_model import INPUTS, decode_request, encode_images
from server.rpc.triton.inputs import PIECE, decode_inputs
from server.rpc.triton.regions import REGION, REGION_SIZE, Place
from server.rpc.triton.shared_memory import SharedMemory
from server.rpc.triton.system_memory import FOLDER, SystemRegion
from server.tensors import DataType, InferRequest, ModelSpec, Tensor, TensorSpec, join_strings, split_strings

KEY = f"zserve_unit_{os.getpid()}"
MANY = 10 * PIECE


@pytest.fixture
def shared_file() -> Iterator[Path]:
    path = Path(FOLDER, KEY)
    path.touch()
    yield path
    path.unlink()


def content_of(file: Path) -> bytes:
    return file.read_bytes()


async def registered(file: Path, size: int) -> SharedMemory:
    """Shared memory with a region of `size` bytes, of which none has been written."""
    os.truncate(file, size)
    memory = SharedMemory(allowed=True)
    await memory.register_system("region", f"/{file.name}", 0, size)
    return memory


def spec(datatype: DataType) -> ModelSpec:
    return ModelSpec("m", "1", "identity", (TensorSpec("A", datatype, (-1,)),), ())


def message(datatype: DataType, count: int, *, shared: int = 0, **contents: Any) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest()
    item = made.inputs.add(name="A", datatype=datatype, shape=[count])
    if shared:
        item.parameters[REGION].string_param = "region"
        item.parameters[REGION_SIZE].int64_param = shared
    if "raw" in contents:
        made.raw_input_contents.append(contents["raw"])
    else:
        item.contents.MergeFrom(pb.InferTensorContents(**contents))
    return made


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads of system shared memory."""
    found: list[int] = []
    read = SystemRegion.read

    async def noted(region: SystemRegion, offset: int, size: int) -> bytes:
        found.append(size)
        return await read(region, offset, size)

    monkeypatch.setattr(SystemRegion, "read", noted)
    return found


HUGE = 1 << 44  # bytes of a file that has none


@pytest.mark.parametrize(
    ("datatype", "count", "size", "text"),
    [
        (DataType.UINT8, 8, HUGE, f"Expected 8, got {HUGE}"),
        (DataType.FP32, 8, 31, "Expected 32, got 31"),
        (DataType.FP32, 1 << 62, 32, f"Expected {1 << 64}, got 32"),
        (DataType.UINT8, HUGE, HUGE, "at most 2147483647 are accepted"),
        (DataType.BYTES, 1, HUGE, "at most 2147483647 are accepted"),
    ],
)
async def test_sizes_are_compared_before_anything_is_read(
    shared_file: Path, reads: list[int], datatype: DataType, count: int, size: int, text: str
) -> None:
    memory = await registered(shared_file, HUGE)
    with pytest.raises(InvalidRequestError, match=text):
        await decode_inputs(message(datatype, count, shared=size), spec(datatype), memory)
    assert not reads


async def test_an_unknown_region_comes_before_a_wrong_size(shared_file: Path) -> None:
    memory = await registered(shared_file, 8)
    await memory.unregister(SystemRegion, "")
    with pytest.raises(NotFoundError):
        await decode_inputs(message(DataType.UINT8, 8, shared=HUGE), spec(DataType.UINT8), memory)


async def test_large_memory_is_read_and_written_in_pieces(
    shared_file: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "PIECE", 16)
    memory = await registered(shared_file, 64)
    content = bytes(range(40))
    await memory.write(Place("region", 4, 60), content)
    assert content_of(shared_file) == bytes(4) + content + bytes(20)
    assert await memory.read(Place("region", 4, 40)) == content
    assert reads == [16, 16, 8]


async def test_nothing_is_written_once_unregistering_has_been_answered(
    shared_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "PIECE", 16)
    memory = await registered(shared_file, 64)
    writing = asyncio.create_task(memory.write(Place("region", 0, 64), b"x" * 64))
    await asyncio.sleep(0)
    await memory.unregister(SystemRegion, "region")
    written = content_of(shared_file)
    with pytest.raises(NotFoundError):
        await writing
    assert content_of(shared_file) == written
    assert 0 < written.count(b"x") < 64


async def test_no_room_for_the_pages_of_an_output(shared_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = await registered(shared_file, 64)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ZServeError, match="No space left on device"):
        await memory.write(Place("region", 0, 64), b"x" * 64)
    monkeypatch.setattr(os, "pwrite", lambda *_: 10)
    with pytest.raises(ZServeError, match="no room for all of it"):
        await memory.write(Place("region", 0, 64), b"x" * 64)


LONG: dict[str, tuple[DataType, dict[str, Any], bytes]] = {
    "raw text": (DataType.BYTES, {"raw": join_strings([b""] * MANY)}, bytes(4 * MANY)),
    "typed text": (DataType.BYTES, {"bytes_contents": [b""] * MANY}, bytes(4 * MANY)),
    "typed numbers": (DataType.UINT16, {"uint_contents": [1] * MANY}, b"\1\0" * MANY),
}


@pytest.mark.parametrize("case", list(LONG))
async def test_others_have_their_turn_while_a_long_input_is_walked(case: str) -> None:
    datatype, contents, data = LONG[case]
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    waiting = asyncio.create_task(others())
    found = await decode_inputs(message(datatype, MANY, **contents), spec(datatype), SharedMemory(allowed=False))
    waiting.cancel()
    assert found["A"].data == data
    assert turns >= MANY // PIECE


@pytest.mark.parametrize("given", [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
@pytest.mark.parametrize("announced", [-1, 0, 1])
async def test_texts_are_counted_across_pieces(given: int, announced: int) -> None:
    wanted = message(DataType.BYTES, given + announced, raw=join_strings([b"a"] * given))
    decoding = decode_inputs(wanted, spec(DataType.BYTES), SharedMemory(allowed=False))
    if not announced:
        assert len((await decoding)["A"].data) == 5 * given
        return
    with pytest.raises(InvalidRequestError, match="more" if announced < 0 else f"got {given}$"):
        await decoding


def test_the_images_of_a_request_are_in_order() -> None:
    """They come as they are finished."""
    images = [Image(index, 7 + index, 1, 1, ImageFormat.RAW, bytes([index] * 3)) for index in (1, 0)]
    completed = Completed(Timings(), (), prompt_cached=False, denoiser_forwards=8)
    pixels, seeds = encode_images(images, completed).outputs
    assert (pixels.shape, pixels.data) == ((2, 1, 1, 3), bytes([0, 0, 0, 1, 1, 1]))
    assert struct.unpack("<2q", seeds.data) == (7, 8)


@pytest.mark.parametrize(("asked", "level"), [(0, 4), (1, 1), (8, 8), (9, 4), (99, 4), (2**64 - 1, 4)])
def test_a_priority_that_is_no_level_of_an_image_model_means_the_default_one(asked: int, level: int) -> None:
    """As in Triton; over our own protocol it is refused."""
    prompt = Tensor("PROMPT", DataType.BYTES, (1,), join_strings([b"a cat"]))
    request = InferRequest(ModelSpec("demo", "1", "z_image", INPUTS, ()), "", {"PROMPT": prompt}, priority=asked)
    assert decode_request(request, ModelConfig("demo")).generation.priority == level


def test_strings_there_and_back() -> None:
    elements = [b"", b"a\0b", "日本".encode()]
    assert list(split_strings(join_strings(elements))) == elements
    with pytest.raises(ValueError, match="incomplete"):
        list(split_strings(b"\xff\xff\xff\xff"))
