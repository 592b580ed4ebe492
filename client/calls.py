"""The two clients: one for ordinary code, one for asyncio. They differ in nothing but how they wait."""

from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from client.messages import Drawing, GenerationFailedError, ImageRequest
from protos.zserve.v1 import image_generation_pb2 as pb
from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc

DEFAULT_URL = "localhost:8001"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

OnEvent = Callable[[pb.GenerateEvent], None]


def _ignore(event: pb.GenerateEvent) -> None:
    pass


class ZImageClient:
    """Calls a zserve server. Usable from several threads.

    Every method raises `GenerationFailedError` when the server answers with an error. `timeout` is in seconds for a
    whole call; a request that passes it is cancelled on the server too.
    """

    def __init__(self, url: str = DEFAULT_URL, *, timeout: float | None = None) -> None:
        self._channel = grpc.insecure_channel(url, options=OPTIONS)
        self._stub: Any = pb_grpc.ImageGenerationStub(self._channel)
        self._timeout = timeout

    def generate(self, request: ImageRequest) -> Iterator[pb.GenerateEvent]:
        """Events as they happen. Closing the iterator cancels the request."""
        call = self._stub.Generate(request.to_message(), timeout=self._timeout)
        try:
            yield from call
        except grpc.RpcError as error:
            raise _failed(error) from None
        finally:
            call.cancel()

    def draw(self, prompt: str, *, on_event: OnEvent = _ignore, **options: Any) -> Drawing:
        """Draws and waits; `options` are those of `ImageRequest`, `on_event` sees every event as it comes."""
        events = []
        for event in self.generate(ImageRequest(prompt, **options)):
            on_event(event)
            events.append(event)
        return Drawing.from_events(events)

    def model(self, name: str = "") -> pb.Model:
        """What a model accepts and runs on."""
        try:
            return self._stub.GetModel(pb.GetModelRequest(model=name), timeout=self._timeout)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            raise _failed(error) from None

    def models(self) -> list[pb.Model]:
        """All models."""
        try:
            return list(self._stub.ListModels(pb.ListModelsRequest(), timeout=self._timeout).models)
        except grpc.RpcError as error:
            raise _failed(error) from None

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncZImageClient:
    """`ZImageClient` for asyncio: the same methods, awaited."""

    def __init__(self, url: str = DEFAULT_URL, *, timeout: float | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(url, options=OPTIONS)
        self._stub: Any = pb_grpc.ImageGenerationStub(self._channel)
        self._timeout = timeout

    async def generate(self, request: ImageRequest) -> AsyncIterator[pb.GenerateEvent]:
        """Events as they happen. Closing the iterator cancels the request."""
        call = self._stub.Generate(request.to_message(), timeout=self._timeout)
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None
        finally:
            call.cancel()

    async def draw(self, prompt: str, *, on_event: OnEvent = _ignore, **options: Any) -> Drawing:
        """Draws and waits; `options` are those of `ImageRequest`, `on_event` sees every event as it comes."""
        events = []
        async for event in self.generate(ImageRequest(prompt, **options)):
            on_event(event)
            events.append(event)
        return Drawing.from_events(events)

    async def model(self, name: str = "") -> pb.Model:
        """What a model accepts and runs on."""
        try:
            return await self._stub.GetModel(pb.GetModelRequest(model=name), timeout=self._timeout)  # type: ignore[no-any-return]
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None

    async def models(self) -> list[pb.Model]:
        """All models."""
        try:
            answer = await self._stub.ListModels(pb.ListModelsRequest(), timeout=self._timeout)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None
        return list(answer.models)

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _failed(error: Any) -> GenerationFailedError:
    return GenerationFailedError(error.code(), error.details() or "")
