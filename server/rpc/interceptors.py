"""One place turns exceptions into gRPC statuses."""

from __future__ import annotations  # the stubs are generic where grpc itself is not

import functools
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from server.errors import InvalidRequestError, ZServeError

log = logging.getLogger(__name__)

STATUS_DETAILS = "grpc-status-details-bin"

Context = grpc.aio.ServicerContext[Any, Any]


Trailers = tuple[tuple[str, bytes], ...]
Translate = Callable[[Exception], Exception]


def unchanged(error: Exception) -> Exception:
    """For services that tell our errors as they are."""
    return error


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Answers a `ZServeError` with its own status and text, anything else with INTERNAL, the detail in the log.

    `translators` put the errors of a service, by its full name, into that service's own terms first.
    """

    def __init__(self, translators: Mapping[str, Translate] | None = None) -> None:
        self._translators = dict(translators or {})

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handlers whose requests come alone and whose responses are returned or yielded.

        The others, such as health's Watch, write to the context and see to their errors themselves.
        """
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming and not inspect.isasyncgenfunction(handler.unary_stream):
            return handler
        service = handler_call_details.method.split("/")[1]
        translate = self._translators.get(service, unchanged)
        coders = {
            "request_deserializer": _forgiving(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_guard_stream(handler.unary_stream, translate), **coders)
        return grpc.unary_unary_rpc_method_handler(_guard_unary(handler.unary_unary, translate), **coders)


def _guard_unary(behaviour: Any, translate: Translate) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(behaviour)
    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await behaviour(_readable(request), context)
        except Exception as error:  # noqa: BLE001 - the process boundary
            await abort(error, context, translate)

    return guarded


def _guard_stream(behaviour: Any, translate: Translate) -> Callable[..., AsyncIterator[Any]]:
    @functools.wraps(behaviour)
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(_readable(request), context):
                yield response
        except Exception as error:  # noqa: BLE001 - the process boundary
            await abort(error, context, translate)

    return guarded


def _forgiving(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Returns what a bad message raised: raised inside gRPC it would be UNKNOWN, and a traceback in the log."""
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return error

    return read


def _readable(request: Any) -> Any:
    if isinstance(request, DecodeError):
        raise unreadable(request)
    return request


def unreadable(error: DecodeError) -> InvalidRequestError:
    """The answer to bytes that are no message of the call's type."""
    return InvalidRequestError(f"the request cannot be read: {error}")


def retry_advice(error: ZServeError) -> Trailers:
    """Trailing metadata that carries google.rpc.RetryInfo, where trying again may help."""
    if error.retry_after is None:
        return ()
    details = status_pb2.Status(code=error.status.value[0], message=str(error))
    advice = error_details_pb2.RetryInfo()
    advice.retry_delay.FromMilliseconds(round(1e3 * error.retry_after))
    details.details.add().Pack(advice)
    return ((STATUS_DETAILS, details.SerializeToString()),)


async def abort(error: Exception, context: Context, translate: Translate = unchanged) -> None:
    """Ends the call with the status that stands for `error`."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    await context.abort(*reported(translate(error)))


def reported(error: Exception) -> tuple[grpc.StatusCode, str, Trailers]:
    """The status, the text and the trailing metadata for the client; the detail of what nobody foresaw is logged."""
    if isinstance(error, ZServeError):
        log.info("%s: %s", error.status.name, error)
        return error.status, str(error), retry_advice(error)
    reference = secrets.token_hex(4)
    log.error("internal error %s", reference, exc_info=error)
    return (
        grpc.StatusCode.INTERNAL,
        f"internal error {reference}; the server's log has the details under this number",
        (),
    )
