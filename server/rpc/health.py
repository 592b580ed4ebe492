"""grpc.health.v1 and reflection, by the gRPC project's own implementations."""

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import service_pb2

from server.rpc.images import SERVICE_NAME

SERVICES = (
    SERVICE_NAME,
    service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
    health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
    reflection.SERVICE_NAME,
)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """The health of the whole server, under "" and under the name of each of its services."""

    def __init__(self) -> None:
        self._servicer = health_aio.HealthServicer()

    async def add_to(self, server: grpc.aio.Server) -> None:
        """Answers Check and Watch on `server` from now on: not serving yet."""
        await self.set(serving=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set(self, *, serving: bool) -> None:
        """Sets the status, and tells everyone who watches."""
        for name in ("", *SERVICES):
            await self._servicer.set(name, SERVING if serving else NOT_SERVING)


def enable_reflection(server: grpc.aio.Server) -> None:
    """Lets tools list and call the services without their proto files."""
    reflection.enable_server_reflection(SERVICES, server)
