"""CUDA shared memory against a stand-in for the driver; with the real one in tests/gpu/test_cuda_shared_memory.py."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from tritonclient.grpc import service_pb2 as pb

from server.config import ServeConfig
from server.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    NotFoundError,
    UnsupportedError,
    ZServeError,
)
from server.rpc.triton.cuda_memory import CudaMemory, CudaRegion, Driver, load_driver
from server.rpc.triton.regions import Place
from server.rpc.triton.servicer import ServerState, TritonServer, TritonServicer
from server.rpc.triton.shared_memory import SharedMemory
from server.rpc.triton.system_memory import SystemRegion
from server.rpc.triton.tensors import InferCall, decode_call
from server.tensors import DataType, Delivery, InferResponse, ModelSpec, Tensor, TensorSpec
from tests.fake_cuda import FakeCuda

SIZE = 64
SPEC = ModelSpec(
    "m", "1", "identity", (TensorSpec("A", DataType.UINT8, (-1,)),), (TensorSpec("B", DataType.UINT8, (-1,)),)
)


@dataclass
class Shared:
    """A server's shared memory over a fake driver, and one region of 64 bytes that count up."""

    cuda: FakeCuda
    memory: SharedMemory
    handle: bytes

    @property
    def content(self) -> bytearray:
        return self.cuda.shared[self.handle]


def over(cuda: FakeCuda) -> SharedMemory:
    def load() -> Driver:
        driver = Driver(cuda)
        driver.call("cuInit", 0)
        return driver

    return SharedMemory(allowed=True, cuda=CudaMemory(load))


@pytest_asyncio.fixture
async def shared() -> AsyncIterator[Shared]:
    cuda = FakeCuda(devices=2)
    made = Shared(cuda, over(cuda), cuda.share(SIZE))
    await made.memory.register_cuda("r", made.handle, 1, SIZE)
    yield made
    await made.memory.close()
    assert not cuda.open
    assert not +cuda.contexts


def request(size: int, offset: int, output: Place | None = None) -> pb.ModelInferRequest:
    """An input in region `r`, and the output where it is wanted."""
    made = pb.ModelInferRequest(model_name="m")
    item = made.inputs.add(name="A", datatype="UINT8", shape=[size])
    places: list[tuple[Any, Place]] = [(item, Place("r", offset, size))]
    if output is not None:
        places.append((made.outputs.add(name="B"), output))
    for tensor, place in places:
        tensor.parameters["shared_memory_region"].string_param = place.region
        tensor.parameters["shared_memory_byte_size"].int64_param = place.size
        tensor.parameters["shared_memory_offset"].int64_param = place.offset
    return made


async def decoded(memory: SharedMemory, message: pb.ModelInferRequest) -> InferCall:
    return await decode_call(message, SPEC, memory, seconds_left=None, delivery=Delivery.ONE)


async def answered(call: InferCall, data: bytes) -> pb.ModelInferResponse:
    message = pb.ModelInferResponse()
    await call.encode(InferResponse((Tensor("B", DataType.UINT8, (len(data),), data),)), message)
    return message


async def test_an_input_is_read_and_an_output_written(shared: Shared) -> None:
    call = await decoded(shared.memory, request(8, 4, Place("r", 32, 16)))
    assert list(call.request.inputs["A"].data) == list(range(4, 12))
    message = await answered(call, b"x" * 8)
    assert list(message.raw_output_contents) == [b""]
    assert message.outputs[0].parameters["shared_memory_byte_size"].int64_param == 8
    assert bytes(shared.content[32:40]) == b"x" * 8
    assert list(shared.content[:32]) + list(shared.content[40:]) == [*range(32), *range(40, SIZE)]


async def test_the_driver_is_called_on_one_thread_that_is_not_the_loops(shared: Shared) -> None:
    await asyncio.gather(*(shared.memory.read(Place("r", i, 1)) for i in range(20)))
    (thread,) = shared.cuda.threads
    assert thread.startswith("cuda-shared-memory")


async def test_the_loop_goes_on_during_a_copy(shared: Shared) -> None:
    shared.cuda.holding.clear()
    reading = asyncio.create_task(shared.memory.read(Place("r", 0, SIZE)))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not reading.done()
    shared.cuda.holding.set()
    assert await reading == bytes(shared.content)


async def test_what_was_asked_for_before_it_was_unregistered_is_read(shared: Shared) -> None:
    shared.cuda.holding.clear()
    reading = asyncio.create_task(shared.memory.read(Place("r", 0, SIZE)))
    await asyncio.sleep(0)
    leaving = asyncio.create_task(shared.memory.unregister(CudaRegion, "r"))
    await asyncio.sleep(0)
    assert not leaving.done()
    shared.cuda.holding.set()
    assert await reading == bytes(shared.content)
    await leaving
    assert not shared.cuda.open


async def test_an_output_whose_region_was_unregistered_meanwhile_is_an_error(shared: Shared) -> None:
    call = await decoded(shared.memory, request(8, 0, Place("r", 0, 8)))
    await shared.memory.unregister(CudaRegion, "")
    with pytest.raises(NotFoundError, match="Unable to find shared memory region: 'r'"):
        await answered(call, b"x" * 8)


@pytest.mark.parametrize(
    ("place", "error", "text"),
    [
        (Place("r", SIZE - 4, 8), InvalidRequestError, r"Invalid offset \+ byte size"),
        (Place("r", SIZE, 1), InvalidRequestError, "Invalid offset for"),
        (Place("r", 0, 2**62), InvalidRequestError, r"Invalid offset \+ byte size"),
        (Place("x", 0, 1), NotFoundError, "Unable to find shared memory region: 'x'"),
    ],
)
async def test_an_output_outside_is_refused_before_anything_is_computed(
    shared: Shared, place: Place, error: type[ZServeError], text: str
) -> None:
    with pytest.raises(error, match=text):
        await decoded(shared.memory, request(8, 0, place))
    with pytest.raises(error, match=text):
        await shared.memory.read(place)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"name": "r"}, AlreadyExistsError, "shared memory region 'r' already in manager"),
        ({"name": ""}, InvalidRequestError, "name"),
        ({"size": 0}, InvalidRequestError, "byte_size 0 of 64"),
        ({"size": SIZE + 1}, InvalidRequestError, "failed to register shared memory region 'n': invalid args"),
        ({"device": 2}, InvalidRequestError, "device_id: 2 is not accepted; 0 to 1 is"),
        ({"device": -1}, InvalidRequestError, "device_id"),
        ({"device": 2**62}, InvalidRequestError, "device_id"),
        ({"handle": b"x" * 63}, InvalidRequestError, "raw_handle: '63 bytes'"),
        ({"handle": b""}, InvalidRequestError, "raw_handle"),
        ({"handle": b"x" * 64}, InvalidRequestError, "failed to open CUDA IPC handle: cuIpcOpenMemHandle: CUDA_ERROR"),
    ],
)
async def test_what_cannot_be_registered(
    shared: Shared, change: dict[str, Any], error: type[ZServeError], text: str
) -> None:
    wanted = {"name": "n", "handle": shared.handle, "device": 0, "size": SIZE, **change}
    with pytest.raises(error, match=text):
        await shared.memory.register_cuda(wanted["name"], wanted["handle"], wanted["device"], wanted["size"])
    assert list(shared.memory.status(CudaRegion, "")) == ["r"]
    assert len(shared.cuda.open) == 1
    assert +shared.cuda.contexts == {1: 1}


async def test_only_the_part_that_was_registered_is_reached(shared: Shared) -> None:
    await shared.memory.register_cuda("part", shared.handle, 0, 16)
    assert await shared.memory.read(Place("part", 8, 8)) == bytes(range(8, 16))
    with pytest.raises(InvalidRequestError):
        await shared.memory.read(Place("part", 8, 9))


async def test_of_two_who_register_a_name_at_once_one_is_refused(shared: Shared) -> None:
    both = (shared.memory.register_cuda("n", shared.handle, 0, SIZE) for _ in range(2))
    results = await asyncio.gather(*both, return_exceptions=True)
    assert [type(r) for r in results] == [type(None), AlreadyExistsError]
    assert len(shared.cuda.open) == 2


async def test_a_client_that_leaves_while_it_registers_leaves_nothing_open_that_is_not_listed(shared: Shared) -> None:
    shared.cuda.holding.clear()
    reading = asyncio.create_task(shared.memory.read(Place("r", 0, 1)))
    await asyncio.sleep(0)
    registering = asyncio.create_task(shared.memory.register_cuda("n", shared.handle, 0, SIZE))
    for _ in range(3):
        await asyncio.sleep(0)
    registering.cancel()
    shared.cuda.holding.set()
    await reading
    with pytest.raises(asyncio.CancelledError):
        await registering
    await shared.memory.unregister(CudaRegion, "n")  # waits until it is there
    assert len(shared.cuda.open) == 1


async def test_a_client_that_leaves_while_it_unregisters_leaves_nothing_open(shared: Shared) -> None:
    shared.cuda.holding.clear()
    reading = asyncio.create_task(shared.memory.read(Place("r", 0, 1)))
    await asyncio.sleep(0)
    leaving = asyncio.create_task(shared.memory.unregister(CudaRegion, "r"))
    for _ in range(3):
        await asyncio.sleep(0)
    leaving.cancel()
    shared.cuda.holding.set()
    await asyncio.gather(reading, leaving, return_exceptions=True)
    await shared.memory.close()
    assert not shared.cuda.open


async def test_a_client_that_dies_fails_its_own_requests_alone(
    shared: Shared, caplog: pytest.LogCaptureFixture
) -> None:
    other = shared.cuda.share(SIZE)
    await shared.memory.register_cuda("other", other, 0, SIZE)
    shared.cuda.leave(shared.handle)
    text = "failed to copy CUDA shared memory region 'r': cuMemcpy.*: CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(ZServeError, match=text):
        await shared.memory.read(Place("r", 0, 8))
    with pytest.raises(ZServeError, match=text):
        await shared.memory.write(Place("r", 0, 8), b"x" * 8)
    assert await shared.memory.read(Place("other", 0, 2)) == b"\0\1"
    await shared.memory.unregister(CudaRegion, "r")
    assert "closing CUDA shared memory region 'r'" in caplog.text
    assert list(shared.memory.status(CudaRegion, "")) == ["other"]


async def test_a_device_is_let_go_with_its_last_region(shared: Shared) -> None:
    await shared.memory.register_cuda("more", shared.cuda.share(8), 1, 8)
    await shared.memory.unregister(CudaRegion, "r")
    assert +shared.cuda.contexts == {1: 1}
    await shared.memory.unregister(CudaRegion, "more")
    assert not +shared.cuda.contexts


async def test_both_kinds_have_one_name_space(shared: Shared, system: str) -> None:
    with pytest.raises(AlreadyExistsError):
        await shared.memory.register_system("r", system, 0, 8)
    await shared.memory.register_system("s", system, 0, 8)
    with pytest.raises(AlreadyExistsError):
        await shared.memory.register_cuda("s", shared.handle, 0, SIZE)
    with pytest.raises(NotFoundError, match="registered as CUDA shared memory, not system shared memory"):
        shared.memory.status(SystemRegion, "r")
    with pytest.raises(NotFoundError, match="registered as system shared memory, not CUDA shared memory"):
        shared.memory.status(CudaRegion, "s")
    with pytest.raises(NotFoundError, match="Unable to find cuda shared memory region: 'x'"):
        shared.memory.status(CudaRegion, "x")
    await shared.memory.unregister(SystemRegion, "r")  # of the other kind: nothing happens, as in Triton
    await shared.memory.unregister(SystemRegion, "")
    assert list(shared.memory.status(CudaRegion, "")) == ["r"]
    assert not shared.memory.status(SystemRegion, "")


@pytest.fixture
def system(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The key of a system region of eight bytes."""
    monkeypatch.setattr("server.rpc.triton.system_memory.FOLDER", str(tmp_path))
    (tmp_path / "key").write_bytes(b"12345678")
    return "/key"


async def test_the_calls_of_the_protocol(shared: Shared) -> None:
    nothing = cast(Any, None)
    server = TritonServer(ServeConfig(Path("models")), "1", nothing, ServerState(), shared.memory, nothing)
    servicer = TritonServicer(server)
    register = pb.CudaSharedMemoryRegisterRequest(name="n", raw_handle=shared.handle, device_id=0, byte_size=8)
    await servicer.CudaSharedMemoryRegister(register, nothing)
    found = await servicer.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest(), nothing)
    assert {n: (r.name, r.device_id, r.byte_size) for n, r in found.regions.items()} == {
        "n": ("n", 0, 8),
        "r": ("r", 1, SIZE),
    }
    await servicer.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest(name="n"), nothing)
    await servicer.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest(name="n"), nothing)  # as in Triton
    assert not (await servicer.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest(), nothing)).regions
    await servicer.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest(), nothing)
    assert not (await servicer.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest(), nothing)).regions


async def test_it_is_advertised_where_it_works() -> None:
    cases = {over(FakeCuda()): ["system_shared_memory", "cuda_shared_memory"], SharedMemory(allowed=False): []}
    for memory, extensions in cases.items():
        assert await memory.extensions() == extensions
        await memory.close()


def without_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)


def without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flags: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    use(monkeypatch, FakeCuda(), cuInit=missing)


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeCuda(devices=0))


def use(monkeypatch: pytest.MonkeyPatch, binding: FakeCuda, **functions: Any) -> None:
    for name, function in functions.items():
        setattr(binding, name, function)
    bindings = type(sys)("cuda.bindings")
    cast(Any, bindings).driver = binding
    monkeypatch.setitem(sys.modules, "cuda", type(sys)("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)


@pytest.mark.parametrize(
    ("lack", "text"),
    [
        (without_binding, r"pip install 'zserve\[cuda-shared-memory\]'"),
        (without_driver, "needs an NVIDIA GPU and its driver .*libcuda"),
        (without_gpu, "needs an NVIDIA GPU and its driver .*CUDA_ERROR_NO_DEVICE"),
    ],
)
async def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, lack: Callable[[pytest.MonkeyPatch], None], text: str
) -> None:
    lack(monkeypatch)
    memory = SharedMemory(allowed=True)
    assert await memory.extensions() == ["system_shared_memory"]
    with pytest.raises(UnsupportedError, match=text):
        await memory.register_cuda("r", b"x" * 64, 0, 8)
    await memory.close()


def test_the_binding_that_is_there_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeCuda(devices=3))
    assert load_driver().call("cuDeviceGetCount") == 3


async def test_not_allowed_is_not_even_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Driver:
        raise AssertionError("loaded")

    memory = SharedMemory(allowed=False, cuda=CudaMemory(load))
    with pytest.raises(UnsupportedError, match="--allow-client-shm=true"):
        await memory.register_cuda("r", b"x" * 64, 0, 8)
    assert await memory.extensions() == []
    await memory.close()
