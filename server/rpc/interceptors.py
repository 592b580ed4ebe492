"""The one place that turns exceptions into gRPC statuses."""

from __future__ import annotations  # the stubs are generic where grpc itself is not

import functools
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from server.errors import InvalidRequestError, ZServeError

log = logging.getLogger(__name__)

STATUS_DETAILS = "grpc-status-details-bin"
MOST_TEXT = 1024  # bytes of an error's text, each possibly sent as three; gRPC drops some of the trailers over 8 KiB

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

Trailers = tuple[tuple[str, bytes], ...]
Translate = Callable[[Exception], Exception]


def unchanged(error: Exception) -> Exception:
    """For services that report our errors as they are."""
    return error


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Answers a `ZServeError` with its own status and text, anything else with INTERNAL, details only in the log.

    `translators`, by full service name, first put errors into that service's own terms.
    """

    def __init__(self, translators: Mapping[str, Translate] | None = None) -> None:
        self._translators = dict(translators or {})

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wraps every handler: each returns or yields its responses."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        translate = self._translators.get(handler_call_details.method.split("/")[1], unchanged)

        @asynccontextmanager
        async def reporting(request: Any, context: Context) -> AsyncIterator[None]:
            try:
                if isinstance(request, DecodeError):
                    raise unreadable(request)
                yield
            except Exception as error:  # noqa: BLE001 - the process boundary
                # A stream's requests are read, and may fail to parse, while it is answered.
                await abort(unreadable(error) if isinstance(error, DecodeError) else error, context, translate)

        return wrapped(handler, reporting)


def wrapped(handler: Handler, around: Callable[[Any, Context], AbstractAsyncContextManager[None]]) -> Handler:
    """`handler` with each call inside `around(request, context)`; for streamed requests, `request` is the stream.

    A single request that cannot be parsed arrives as the DecodeError.
    """
    behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

    @functools.wraps(behaviour)
    async def one(request: Any, context: Context) -> Any:
        async with around(request, context):
            return await behaviour(request, context)

    @functools.wraps(behaviour)
    async def many(request: Any, context: Context) -> AsyncIterator[Any]:
        async with around(request, context), aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

    read = handler.request_deserializer if handler.request_streaming else _forgiving(handler.request_deserializer)
    make = _MAKERS[handler.request_streaming, handler.response_streaming]
    return make(many if handler.response_streaming else one, read, handler.response_serializer)


_MAKERS: dict[tuple[bool, bool], Callable[..., Handler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _forgiving(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Returns a DecodeError instead of raising it: gRPC would make it UNKNOWN, and log a traceback."""
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return error

    return read


def unreadable(error: DecodeError) -> InvalidRequestError:
    """The answer to bytes that are not a message of the call's type."""
    return InvalidRequestError(f"the request cannot be read: {error}")


def retry_advice(error: ZServeError) -> Trailers:
    """Trailing metadata that carries google.rpc.RetryInfo, where trying again may help."""
    if error.retry_after is None:
        return ()
    details = status_pb2.Status(code=error.status.value[0], message=_text(error))
    advice = error_details_pb2.RetryInfo()
    advice.retry_delay.FromMilliseconds(round(1e3 * error.retry_after))
    details.details.add().Pack(advice)
    return ((STATUS_DETAILS, details.SerializeToString()),)


def _text(error: ZServeError) -> str:
    """The error's text, cut to fit twice (the details repeat it): a client does not read longer trailers.

    It may mention a file whose name is not UTF-8.
    """
    data = str(error).encode(errors="replace")
    return data.decode() if len(data) <= MOST_TEXT else data[:MOST_TEXT].decode(errors="ignore") + " ..."


def _one_line(text: str) -> str:
    """Escapes `text` for the log: what clients send must not look like log lines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


async def abort(error: Exception, context: Context, translate: Translate = unchanged) -> None:
    """Ends the call with the status that stands for `error`."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    await context.abort(*reported(translate(error)))


def reported(error: Exception) -> tuple[grpc.StatusCode, str, Trailers]:
    """The status, the text and the trailing metadata for the client; details of unexpected errors are logged."""
    if isinstance(error, ZServeError):
        log.info("%s: %s", error.status.name, _one_line(_text(error)))
        return error.status, _text(error), retry_advice(error)
    reference = secrets.token_hex(4)
    log.error("internal error %s", reference, exc_info=error)
    return (
        grpc.StatusCode.INTERNAL,
        f"internal error {reference}; the server's log has the details under this number",
        (),
    )
