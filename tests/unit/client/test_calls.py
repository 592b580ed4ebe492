"""What the two clients send with each call, and what they make of the answers, with a server that costs nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from client import AsyncZImageClient, Drawing, GenerationFailedError, ZImageClient
from client.messages import STATUS_DETAILS
from protos.zserve.v1 import image_generation_pb2 as pb
from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc

METADATA = (("authorization", "Bearer secret"),)
WIDE = 3 * 2**20  # pixels, of 3 bytes each: more than gRPC takes where it is not told to


class Recorder(pb_grpc.ImageGenerationServicer):
    """Remembers what it is asked, with the call's own metadata and deadline; sends the second of two images first."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def _note(self, request: Any, context: Any) -> None:
        told = dict(context.invocation_metadata())
        self.asked.append((request, told.get("authorization"), context.time_remaining() is not None))

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateEvent]:  # noqa: N802 - the protocol's name
        self._note(request, context)
        for index in (1, 0):
            image = pb.Image(index=index, seed=7 + index, width=WIDE, height=1, format=pb.IMAGE_FORMAT_RAW)
            image.data = bytes(3 * WIDE)
            yield pb.GenerateEvent(request_id="r", image=image)
        yield pb.GenerateEvent(request_id="r", completed=pb.Completed(denoiser_forwards=8))

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:  # noqa: N802 - the protocol's name
        self._note(request, context)
        return pb.Model(name=request.model)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802 - the protocol's name
        self._note(request, context)
        return pb.ListModelsResponse(models=[pb.Model(name="a"), pb.Model(name="b")])

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = grpc.aio.server()
        pb_grpc.add_ImageGenerationServicer_to_server(self, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        yield f"127.0.0.1:{port}"
        await server.stop(None)


Answers = tuple[pb.Model, list[pb.Model], Drawing]


def ask(url: str, on_event: Callable[[pb.GenerateEvent], None], **options: Any) -> Answers:
    with ZImageClient(url, **options) as client:
        answers = client.model("a"), client.models(), client.draw("a cat", on_event=on_event, num_images=2)
    with pytest.raises(GenerationFailedError, match="the client is closed"):
        client.models()
    return answers


async def ask_awaiting(url: str, on_event: Callable[[pb.GenerateEvent], None], **options: Any) -> Answers:
    async with AsyncZImageClient(url, **options) as client:
        model, models = await client.model("a"), await client.models()
        answers = model, models, await client.draw("a cat", on_event=on_event, num_images=2)
    with pytest.raises(GenerationFailedError, match="the client is closed"):
        await client.models()
    return answers


@pytest.mark.parametrize("awaiting", [False, True], ids=["ordinary", "asyncio"])
@pytest.mark.parametrize("limit", [None, 1e8], ids=["no timeout", "the longest"])
async def test_every_call_is_sent_with_what_the_client_was_made_with(awaiting: bool, limit: float | None) -> None:
    recorder, seen = Recorder(), list[str | None]()
    with_it: dict[str, Any] = {"timeout": limit, "metadata": METADATA}

    def on_event(event: pb.GenerateEvent) -> None:
        seen.append(event.WhichOneof("event"))

    async with recorder.serving() as url:
        if awaiting:
            model, models, drawing = await ask_awaiting(url, on_event, **with_it)
        else:
            model, models, drawing = await asyncio.to_thread(ask, url, on_event, **with_it)
    assert (model.name, [m.name for m in models]) == ("a", ["a", "b"])
    assert seen == ["image", "image", "completed"]
    assert (drawing.request_id, drawing.completed.denoiser_forwards) == ("r", 8)
    assert [(i.index, i.seed, i.width, i.height, i.format) for i in drawing.images] == [
        (index, 7 + index, WIDE, 1, "raw") for index in (0, 1)
    ]
    assert drawing.images[0].pillow().size == (WIDE, 1)
    assert [asked[1:] for asked in recorder.asked] == 3 * [("Bearer secret", limit is not None)]
    assert recorder.asked[2][0].num_images == 2


class Refusal:
    """As gRPC tells of it; some have neither text nor trailers."""

    def __init__(self, details: str | None, trailers: tuple[tuple[str, Any], ...] | None) -> None:
        self._details, self._trailers = details, trailers

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.RESOURCE_EXHAUSTED

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, Any], ...] | None:
        return self._trailers


def test_an_error_says_after_how_many_seconds_to_try_again_wherever_among_the_details_that_is() -> None:
    status = status_pb2.Status()
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="full"))
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)))
    trailers = (("other-bin", b"\xff"), (STATUS_DETAILS, status.SerializeToString()))
    assert GenerationFailedError.of(Refusal("full", trailers)).retry_after == 1.5
    bare = GenerationFailedError.of(Refusal(None, None))
    assert (bare.details, bare.retry_after) == ("", None)
