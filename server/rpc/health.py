"""grpc.health.v1, and reflection by the gRPC project's own implementation."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import service_pb2

from server.errors import NotFoundError
from server.rpc.images import SERVICE_NAME, Context

SERVICES = (
    SERVICE_NAME,
    service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
    health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
    reflection.SERVICE_NAME,
)
KNOWN = frozenset({"", *SERVICES})
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The health of the whole server, under "" and under the name of each of its services; at first it serves nothing.

    The gRPC project's own class (grpcio-health-checking 1.81) tells no other watcher anything once one has left, and
    waits for each to take what it is told: one that does not read would hold up all others, and the server's end.
    """

    def __init__(self) -> None:
        self._serving = False
        self._changed = asyncio.Event()  # set at the next change, which brings another one

    def add_to(self, server: grpc.aio.Server) -> None:
        """Answers Check and Watch on `server` from now on."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def set(self, *, serving: bool) -> None:
        """Sets the status, and has everyone who watches told."""
        if serving is not self._serving:
            self._serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        if request.service not in KNOWN:
            raise NotFoundError(f"there is no service {request.service[:64]!r}; {', '.join(SERVICES)} are served")
        return self._answer(request)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told = None
        while True:
            changed, answer = self._changed, self._answer(request)
            if answer != told:  # it may have changed back while the client took the last one
                told = answer
                yield answer
            await changed.wait()

    def _answer(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        known = SERVING if self._serving else NOT_SERVING
        return health_pb2.HealthCheckResponse(status=known if request.service in KNOWN else SERVICE_UNKNOWN)


def enable_reflection(server: grpc.aio.Server) -> None:
    """Lets tools list and call the services without their proto files."""
    reflection.enable_server_reflection(SERVICES, server)
