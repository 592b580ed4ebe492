"""`zserve.v1.ImageGeneration`, both sides: the servicer over any `ImageService`, and the client a frontend uses."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from protos.zserve.v1 import image_generation_pb2 as pb
from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc
from server.errors import WorkerLostError, ZServeError, error_of_status
from server.requests import Completed, Event, GenerationRequest, Image, InstanceInfo
from server.rpc import convert
from server.rpc.descriptions import decode_instance, encode_model
from server.service import ImageService, ModelStatus

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ImageGeneration"].full_name
MAX_MESSAGE_BYTES = 2**31 - 1  # Triton's; gRPC's default of 4 MB is less than two raw 1024x1024 images
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
# Connecting to a worker is retried often: gRPC's default backoff grows to two minutes, in which nobody would notice
# that it is ready. The time to connect (`min_reconnect_backoff_ms`) stays gRPC's 20 s: on a busy machine connecting
# takes longer than these pauses.
WORKER_CHANNEL_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]

# How long a request has waited before a worker gets it (milliseconds), and whether its queue timeout has passed. Only
# a worker heeds them.
WAITED, DELAYED = "zserve-waited-ms", "zserve-delayed"
MOST_DIGITS = 15
# What a worker answers before it does anything else: only a request that has reached it can be what ends it.
REACHED = "zserve-reached"

Context = grpc.aio.ServicerContext[Any, Any]


class ImageGenerationServicer(pb_grpc.ImageGenerationServicer):
    """Decode, call, encode."""

    def __init__(self, service: ImageService) -> None:
        self._service = service

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateEvent, None]:
        if WAITED in _told(context):  # by a frontend: to clients, a call that has headers is one not to be retried
            await context.send_initial_metadata(((REACHED, ""),))
        decoded = self._decode(request, context)
        async with aclosing(self._service.generate(decoded)) as events:
            async for event in events:
                yield convert.encode_event(event, decoded.request_id)

    async def GenerateImage(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateImageResponse:
        decoded = replace(self._decode(request, context), preview_interval=0)  # the response has no place for them
        response = pb.GenerateImageResponse(request_id=decoded.request_id)
        async with aclosing(self._service.generate(decoded)) as events:
            async for event in events:
                if isinstance(event, Image):
                    response.images.add(**convert.image_fields(event))
                elif isinstance(event, Completed):
                    response.completed.CopyFrom(convert.encode_completed(event))
        return response

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:
        return _encode_status(self._service.model(request.model))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[_encode_status(m) for m in self._service.models()])

    def _decode(self, request: pb.GenerateRequest, context: Context) -> GenerationRequest:
        model = self._service.model(request.model)
        decoded = convert.decode_request(request, model.config, context.time_remaining())
        told = _told(context)
        waited = told.get(WAITED, "")[:MOST_DIGITS]
        return replace(decoded, waited=int(waited) / 1e3 if waited.isdecimal() else 0.0, delayed=DELAYED in told)


def _told(context: Context) -> dict[str, str]:
    """The metadata of the call."""
    return {str(name): str(value) for name, value in context.invocation_metadata() or ()}


def _encode_status(status: ModelStatus) -> pb.Model:
    return encode_model(status.config, status.instances, ready=status.ready, reason=status.reason)


class ImageGenerationClient:
    """Calls a worker; its errors are raised here as the same types."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=WORKER_CHANNEL_OPTIONS)
        self._stub: Any = pb_grpc.ImageGenerationStub(self._channel)

    async def instance(self, within: float | None = None) -> InstanceInfo:
        """The worker's description of itself; waits until it serves, that is, until it is warmed up.

        Raises:
            WorkerLostError: it did not answer within `within` seconds, or its device has stopped answering.
        """
        try:
            model = await self._stub.GetModel(pb.GetModelRequest(), wait_for_ready=True, timeout=within)
        except grpc.aio.AioRpcError as error:
            expired = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            reason = f"it did not answer within {within} s" if expired else "its connection broke off"
            raise WorkerLostError(reason) from None
        if not model.ready:
            raise WorkerLostError(model.state_reason)
        return decode_instance(model)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The worker's events. Closing the generator cancels the call, and so frees the request's place.

        Raises:
            WorkerLostError: the worker ended, or is not there.
            ZServeError: what the worker raised.
        """
        told = [(WAITED, str(round(1e3 * request.waited))), *([(DELAYED, "")] if request.delayed else [])]
        connected = self._channel.get_state() is grpc.ChannelConnectivity.READY
        call = self._stub.Generate(convert.encode_request(request), timeout=request.timeout, metadata=told)
        try:
            async for message in call:
                event = convert.decode_event(message)
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            raise _raised_by_worker(error, connected) from None
        except asyncio.CancelledError:
            if _is_being_cancelled():
                raise
            message = "the channel to the worker was closed while it had the request; send it again"
            raise WorkerLostError(message, reached=None if connected else False) from None
        finally:
            call.cancel()

    async def close(self, grace: float | None = None) -> None:
        """Closes the channel; calls still under way after `grace` seconds lose their worker."""
        await self._channel.close(grace)


def _is_being_cancelled() -> bool:
    """Whether the running task is; to its caller, a call that is cancelled by `close` looks the same."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _raised_by_worker(error: grpc.aio.AioRpcError, connected: bool) -> ZServeError:
    details = error.details() or ""
    # CANCELLED does not come from here: the worker cancelled the call, because it was told to stop.
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        message = f"the worker process ended while it had the request ({details}); send it again"
        # Where this event loop is busy, gRPC may report the end of a call without what was received before it.
        reached = True if REACHED in (error.initial_metadata() or ()) else None if connected else False
        return WorkerLostError(message, reached=reached)
    return error_of_status(error.code(), details)
