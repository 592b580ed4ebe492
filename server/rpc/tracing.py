"""The image service with its requests traced; workers use the plain one."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from typing import Any

from protos.zserve.v1 import image_generation_pb2 as pb
from server.rpc.images import SERVICE_NAME, Context, ImageGenerationServicer
from server.service import ImageService
from server.statistics import OBSERVER
from server.tracing import Call, Trace, Tracer, trace_context


def end_with_call(tracer: Tracer, trace: Trace, context: Any) -> None:
    """Ends `trace` when its response has been sent, or the client is gone."""
    context.add_done_callback(lambda _: tracer.end(trace))


class TracedImageGenerationServicer(ImageGenerationServicer):
    """See the module."""

    def __init__(self, service: ImageService, tracer: Tracer) -> None:
        super().__init__(service)
        self._tracer = tracer

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateEvent, None]:
        with self._following("Generate", request, context) as trace:
            async with aclosing(super().Generate(request, context)) as events:
                async for event in events:
                    with trace.sending() if trace and event.HasField("image") else nullcontext():
                        yield event

    async def GenerateImage(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateImageResponse:
        with self._following("GenerateImage", request, context):
            return await super().GenerateImage(request, context)

    @contextmanager
    def _following(self, method: str, request: pb.GenerateRequest, context: Context) -> Iterator[Trace | None]:
        status = self._service.model(request.model)
        version = status.instances[0].version if status.instances else ""
        call = Call(f"{SERVICE_NAME}/{method}", trace_context(context.invocation_metadata()))
        trace = self._tracer.begin(status.config.name, version, request.request_id, call)
        OBSERVER.set(trace)
        if trace is None:
            yield None
            return
        end_with_call(self._tracer, trace, context)
        with trace.answering():
            yield trace
