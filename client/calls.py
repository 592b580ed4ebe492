"""The two clients: one for ordinary code, one for asyncio. They differ only in how they wait."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from client.messages import Drawing, GenerationFailedError, ImageRequest
from protos.zserve.v1 import image_generation_pb2 as pb
from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc

DEFAULT_URL = "localhost:8001"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
LONGEST_TIMEOUT = 1e8  # seconds; gRPC turns much more into a deadline that has passed
CLOSED = "the client is closed; make another"

OnEvent = Callable[[pb.GenerateEvent], None]
Metadata = Sequence[tuple[str, str | bytes]]


def _ignore(event: pb.GenerateEvent) -> None:
    pass


class ZImageClient:
    """Calls a zserve server. Usable from several threads.

    Every method raises `GenerationFailedError` when the server answers with an error, or when the client is closed,
    before or meanwhile (CANCELLED).

    Args:
        url: HOST:PORT.
        timeout: seconds for a whole call; a request that passes it is cancelled on the server too.
        credentials: for a server with TLS, those of `grpc.ssl_channel_credentials`.
        metadata: sent with every call, for example `[("authorization", "Bearer " + token)]`.

    Raises:
        ValueError: a timeout or metadata that are not accepted.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
    ) -> None:
        self._with, self._closed = _with(timeout, metadata), False
        if credentials is None:
            self._channel = grpc.insecure_channel(url, options=OPTIONS)
        else:
            self._channel = grpc.secure_channel(url, credentials, options=OPTIONS)
        self._stub: Any = pb_grpc.ImageGenerationStub(self._channel)

    def generate(self, request: ImageRequest) -> Iterator[pb.GenerateEvent]:
        """Events as they happen. Closing the iterator cancels the request."""
        message = request.to_message()
        with _failures(self):
            call = self._stub.Generate(message, **self._with)
            try:
                yield from call
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
        with _failures(self):
            return self._stub.GetModel(pb.GetModelRequest(model=name), **self._with)  # type: ignore[no-any-return]

    def models(self) -> list[pb.Model]:
        """All models."""
        with _failures(self):
            return list(self._stub.ListModels(pb.ListModelsRequest(), **self._with).models)

    def close(self) -> None:
        """Closes the connection."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncZImageClient:
    """`ZImageClient` for asyncio: the same methods, awaited. It belongs to the event loop of its first call."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
    ) -> None:
        self._with, self._closed = _with(timeout, metadata), False
        self._url, self._credentials = url, credentials

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        # Opened at the first call: gRPC ties a channel to the running loop, and a client may be made before one runs.
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._url, options=OPTIONS)
        return grpc.aio.secure_channel(self._url, self._credentials, options=OPTIONS)

    @cached_property
    def _stub(self) -> Any:
        return pb_grpc.ImageGenerationStub(self._channel)

    async def generate(self, request: ImageRequest) -> AsyncIterator[pb.GenerateEvent]:
        """Events as they happen. Closing the iterator cancels the request."""
        message = request.to_message()
        with _failures(self):
            call = self._stub.Generate(message, **self._with)
            try:
                async for event in call:
                    yield event
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
        with _failures(self):
            return await self._stub.GetModel(pb.GetModelRequest(model=name), **self._with)  # type: ignore[no-any-return]

    async def models(self) -> list[pb.Model]:
        """All models."""
        with _failures(self):
            return list((await self._stub.ListModels(pb.ListModelsRequest(), **self._with)).models)

    async def close(self) -> None:
        """Closes the connection."""
        self._closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _with(timeout: float | None, metadata: Metadata) -> dict[str, Any]:
    """What goes with every call."""
    if timeout is not None and not 0 < timeout <= LONGEST_TIMEOUT:
        raise ValueError(
            f"timeout: {timeout} is not accepted; seconds above 0 to {LONGEST_TIMEOUT:g} are, None for none"
        )
    return {"timeout": timeout, "metadata": _checked(tuple(metadata))}


def _checked(metadata: Metadata) -> Metadata:
    """`metadata`, if gRPC takes it: it says so only at each call, and not what is wrong. Values may be secret."""
    for name, value in metadata:
        if not re.fullmatch(r"[0-9a-z_.-]+", name):
            raise ValueError(
                f"metadata: the name {name!r} is not accepted; small letters, digits, '_', '.' and '-' are"
            )
        binary = name.endswith("-bin")
        fits = isinstance(value, bytes) if binary else isinstance(value, str) and re.fullmatch(r"[ -~]*", value)
        if not fits:
            accepted = "bytes are, as for every name that ends in -bin" if binary else "a line of printable ASCII is"
            raise ValueError(f"metadata: the value of {name} is not accepted; {accepted}")
    return metadata


@contextmanager
def _failures(client: ZImageClient | AsyncZImageClient) -> Iterator[None]:
    """Raises gRPC's errors, and those of a closed client, as `GenerationFailedError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise GenerationFailedError.of(error) from None
    except (ValueError, grpc.aio.UsageError):
        if not client._closed:
            raise
        raise GenerationFailedError(grpc.StatusCode.CANCELLED, CLOSED) from None  # closed before the call began
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # This is how gRPC tells a call that its channel was closed; the task itself was not cancelled.
        raise GenerationFailedError(grpc.StatusCode.CANCELLED, CLOSED) from None
