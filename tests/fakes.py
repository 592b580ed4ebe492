"""Ordinary classes that stand in for devices and engines."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc.aio
from torch import Tensor

from export.manifest import Backend
from protos.zserve.v1 import image_generation_pb2 as pb
from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc
from server.backends.base import Host, ModelFolder
from server.engines.base import Shapes
from server.errors import EngineLoadError
from server.requests import GenerationRequest, ImageFormat
from server.statistics import Statistics
from server.tensors import InferRequest, InferResponse
from verify.painter import one_image


class FakeClock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeEngine:
    """Answers with what `answer` makes of the inputs, and remembers being closed."""

    answer: Callable[[Mapping[str, Tensor]], Tensor]
    backend: Backend = Backend.ONNXRUNTIME
    accepts: Callable[[Shapes], bool] = lambda shapes: True
    calls: int = 0
    closed: bool = False

    def fits(self, shapes: Shapes) -> bool:
        return self.accepts(shapes)

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.calls += 1
        return self.answer(inputs)

    def close(self) -> None:
        self.closed = True


def raising(error: Exception) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """An `answer` that fails."""

    def answer(inputs: Mapping[str, Tensor]) -> Tensor:
        raise error

    return answer


@dataclass
class FakeGraph:
    """Does the recorded work again when it is replayed."""

    work: Callable[[], Tensor]
    output: Tensor
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self.work())

    def pool(self) -> str:
        return "pool"


@dataclass
class FakeRecorder:
    """Records `FakeGraph`s; `fault` is what recording comes to."""

    fault: Exception | None = None
    graphs: list["FakeGraph"] = field(default_factory=list)
    beside: list["FakeGraph | None"] = field(default_factory=list)  # whose memory each of them was to share

    def __call__(self, work: Callable[[], Tensor], beside: FakeGraph | None) -> tuple[FakeGraph, Tensor]:
        output = work()
        if self.fault is not None:
            raise self.fault
        self.graphs.append(FakeGraph(work, output))
        self.beside.append(beside)
        return self.graphs[-1], output


class FakeModel:
    """A version that is loaded when its backend says so, and fails to where its config says `fails`."""

    def __init__(self, folder: ModelFolder, backend: "FakeBackend") -> None:
        self.spec = folder.spec()
        self.folder = folder
        self.statistics = Statistics()
        self.ready = False
        self.retired, self.unloaded = asyncio.Event(), asyncio.Event()
        self.unloading = 0  # times that it was to be unloaded
        self._backend = backend

    async def load(self) -> None:
        self._backend.loading.put_nowait(self)
        await self._backend.go.wait()
        if self.spec.version in self._backend.stuck:
            await asyncio.Event().wait()
        if "fails" in self.folder.file.parameters:
            raise EngineLoadError("it is to fail")
        self.ready = True

    def retire(self) -> None:
        self.retired.set()

    async def unload(self) -> None:
        self.ready = False
        self.unloading += 1
        self._backend.changed()
        await self._backend.unloads.wait()
        self.unloaded.set()

    def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        raise AssertionError("it is loaded and unloaded, and asked nothing")


class FakeBackend:
    """Makes a FakeModel of every version, and remembers them; loads end at once unless `go` is cleared."""

    def __init__(self) -> None:
        self.made: list[FakeModel] = []
        self.loading: asyncio.Queue[FakeModel] = asyncio.Queue()  # those whose load has begun
        self.go = asyncio.Event()
        self.go.set()
        self.stuck: set[str] = set()  # versions whose load does not end
        self.unloads = asyncio.Event()  # what is to be unloaded goes when this is set
        self.unloads.set()
        self.changed: Callable[[], None] = lambda: None

    def __call__(self, folder: ModelFolder, host: Host) -> FakeModel:
        self.made.append(FakeModel(folder, self))
        return self.made[-1]


def a_request() -> GenerationRequest:
    """A small valid request, to be varied with `dataclasses.replace`."""
    plain = one_image("a red circle", (64, 64), steps=2, seed=7)
    return replace(plain, request_id="test", model="demo", image_format=ImageFormat.PNG)


class FakeImages(pb_grpc.ImageGenerationServicer):
    """Sends so many images of one black pixel and then fails with `status`; where that is None, nothing more comes."""

    def __init__(self, images: int, status: grpc.StatusCode | None) -> None:
        self._images, self._status = images, status
        self.asked = asyncio.Event()

    async def Generate(  # noqa: N802 - the protocol's name
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateEvent]
    ) -> AsyncIterator[pb.GenerateEvent]:
        self.asked.set()
        for index in range(self._images):
            pixel = pb.Image(index=index, seed=index, width=1, height=1, format=pb.IMAGE_FORMAT_RAW, data=bytes(3))
            yield pb.GenerateEvent(image=pixel)
        if self._status is None:
            await asyncio.Event().wait()
        else:
            await context.abort(self._status, "that is all")

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Its HOST:PORT, for as long as it is there."""
        server = grpc.aio.server()
        pb_grpc.add_ImageGenerationServicer_to_server(self, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)
