"""The image service with its calls traced: what a trace is told of a call, over a real channel."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from protos.zserve.v1 import image_generation_pb2 as pb
from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc
from server.config import ModelConfig
from server.requests import Completed, Event, GenerationRequest, Image, ImageFormat, Progress, Queued, Started, Timings
from server.rpc.tracing import TracedImageGenerationServicer
from server.service import ModelStatus
from server.settings import TraceLevel, TraceMode, TraceSettings
from server.statistics import OBSERVER
from server.tracing import Trace, Tracer
from tests.unit.server.test_cache import INSTANCE

ON = TraceSettings(frozenset({TraceLevel.TIMESTAMPS}), trace_rate=1, trace_mode=TraceMode.OPENTELEMETRY)
PATIENCE = 100.0  # seconds for what has to come about
REQUEST = pb.GenerateRequest(prompt="a red circle", request_id="r", seed=7, num_images=2)
CONTEXT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "vendor=1"}


class Drawing:
    """An image service that tells whoever follows the request of two images, and goes no further where it `hangs`."""

    def __init__(self, *, hangs: bool = False, starting: bool = False) -> None:
        self._hangs = hangs
        self._instances = () if starting else (replace(INSTANCE, version="3"),)
        self.hanging, self.left = asyncio.Event(), asyncio.Event()  # all images are sent; the request is over

    def model(self, name: str) -> ModelStatus:
        return ModelStatus(ModelConfig("demo"), self._instances, ready=bool(self._instances))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        try:
            yield self._told(Queued(1))
            yield self._told(Started("w0"))
            for index in range(request.num_images):
                yield self._told(Progress(1, 1, index))
                yield self._told(Image(index, 7, 64, 64, ImageFormat.PNG, b""))
            if self._hangs:
                self.hanging.set()
                await asyncio.Event().wait()
            yield self._told(Completed(Timings(encode_ms=1.0), (), prompt_cached=False, denoiser_forwards=2))
        finally:
            self.left.set()

    def _told(self, event: Event) -> Event:
        observer = OBSERVER.get()
        assert observer is not None
        observer.see(event)
        return event


class Traces:
    """What is written, with a server that makes it."""

    def __init__(self) -> None:
        self.written: list[Trace] = []
        self.tracer = Tracer(ON, self.written.append, lambda: None)

    @asynccontextmanager
    async def of(self, service: Drawing) -> AsyncIterator[Any]:
        """A stub; all traces are written afterwards."""
        server = grpc.aio.server()
        pb_grpc.add_ImageGenerationServicer_to_server(
            TracedImageGenerationServicer(service, self.tracer),  # type: ignore[arg-type]
            server,
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield pb_grpc.ImageGenerationStub(channel)
        await server.stop(PATIENCE)
        await self.tracer.close()


def stages(trace: Trace) -> dict[str, int]:
    return dict(Counter(stage.name for stage in trace.stages))


@pytest.mark.parametrize(("method", "sent"), [("Generate", 2), ("GenerateImage", 1)])
async def test_a_trace_tells_what_was_called_and_where_its_time_went(method: str, sent: int) -> None:
    """Each image of a stream is sent by itself."""
    traces = Traces()
    async with traces.of(Drawing()) as stub:
        call = getattr(stub, method)(REQUEST, metadata=tuple(CONTEXT.items()))
        if method == "Generate":
            assert len([event async for event in call]) == 7
        else:
            assert len((await call).images) == 2
    (trace,) = traces.written
    assert (trace.call.method, trace.call.context) == (f"zserve.v1.ImageGeneration/{method}", CONTEXT)
    assert (trace.model, trace.version, trace.request_id, trace.error) == ("demo", "3", "r", "")
    drawn = {"queue": 1, "step": 2, "decode": 2, "encode_image": 2, "encode": 1}
    assert stages(trace) == drawn | {"send": sent}
    assert trace.began < trace.answered <= trace.ended


async def test_a_call_whose_client_leaves_is_traced_up_to_then() -> None:
    traces, service = Traces(), Drawing(hangs=True)
    async with traces.of(service) as stub:
        call = stub.Generate(REQUEST)
        await asyncio.wait_for(service.hanging.wait(), PATIENCE)
        call.cancel()
        await asyncio.wait_for(service.left.wait(), PATIENCE)
    (trace,) = traces.written
    assert trace.error.startswith("CancelledError")
    assert stages(trace) == {"queue": 1, "step": 2, "decode": 2, "encode_image": 2, "send": 2}


async def test_a_call_of_a_model_that_has_no_worker_yet_is_traced_without_a_version() -> None:
    traces = Traces()
    async with traces.of(Drawing(starting=True)) as stub:
        await stub.GenerateImage(REQUEST)
    (trace,) = traces.written
    assert (trace.model, trace.version) == ("demo", "")
