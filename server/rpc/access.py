"""Who may call what: restricted groups of calls, bearer tokens, and how many calls one client may have open."""

from __future__ import annotations  # the stubs are generic where grpc itself is not

import hmac
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from server.errors import AccessDeniedError, TooManyCallsError, UnavailableError, ZServeError
from server.rpc.interceptors import Context, Handler, wrapped
from server.settings import BEARER_HEADER, GrpcConfig, Protocol

_METHODS = {
    Protocol.HEALTH: "ServerLive ServerReady ModelReady Check Watch",
    Protocol.METADATA: "ServerMetadata ModelMetadata GetModel ListModels ServerReflectionInfo",
    Protocol.INFERENCE: "ModelInfer ModelStreamInfer Generate GenerateImage",
    Protocol.SHARED_MEMORY: "SystemSharedMemoryStatus SystemSharedMemoryRegister SystemSharedMemoryUnregister "
    "CudaSharedMemoryStatus CudaSharedMemoryRegister CudaSharedMemoryUnregister",
    Protocol.MODEL_CONFIG: "ModelConfig",
    Protocol.MODEL_REPOSITORY: "RepositoryIndex RepositoryModelLoad RepositoryModelUnload",
    Protocol.STATISTICS: "ModelStatistics",
    Protocol.TRACE: "TraceSetting",
    Protocol.LOGGING: "LogSettings",
}
PROTOCOL_OF = {method: protocol for protocol, methods in _METHODS.items() for method in methods.split()}


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without the headers they need, and inference calls past a client's share."""

    def __init__(self, config: GrpcConfig) -> None:
        self._restrictions = config.restrictions
        self._most = config.max_calls_per_client
        self._open: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Returns the handler, one that also counts calls, or one that refuses."""
        # A call that belongs to no group has to meet every restriction.
        method = handler_call_details.method.rpartition("/")[2]
        refused = self._refusal(PROTOCOL_OF.get(method), handler_call_details)
        if refused is not None:
            return _refuse(refused)
        handler = await continuation(handler_call_details)
        if handler is None or not self._most or PROTOCOL_OF.get(method) is not Protocol.INFERENCE:
            return handler
        return wrapped(handler, self._place)

    def _refusal(self, protocol: Protocol | None, details: grpc.HandlerCallDetails) -> ZServeError | None:
        given = {str(key): value for key, value in details.invocation_metadata or ()}
        for restriction in self._restrictions:
            if protocol is not None and protocol not in restriction.protocols:
                continue
            if not _equal(given.get(restriction.header, ""), restriction.value):
                return _error(restriction.header)
        return None

    @asynccontextmanager
    async def _place(self, _: Any, context: Context) -> AsyncIterator[None]:
        client = context.peer().rpartition(":")[0]  # all connections of one address together
        if self._open[client] >= self._most:
            raise TooManyCallsError(f"{self._most} inference calls of this client are open; wait for one to end")
        self._open[client] += 1
        try:
            yield
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]


def _equal(given: str | bytes, secret: str) -> bool:
    """Compares in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode() if isinstance(given, str) else given, secret.encode())


def _error(header: str) -> ZServeError:
    if header == BEARER_HEADER:
        return AccessDeniedError("this call needs the header 'authorization: Bearer TOKEN' with the server's token")
    return UnavailableError(f"This protocol is restricted, expecting header '{header}'")


def _refuse(error: ZServeError) -> Handler:
    """A handler that refuses calls of any kind, without waiting for a stream."""

    async def refuse(requests: Any, context: Context) -> AsyncIterator[Any]:
        raise error
        yield  # type: ignore[unreachable]  # makes it a generator, as the calls of streams are

    return grpc.stream_stream_rpc_method_handler(refuse)
