"""A gRPC server on its port: what its transport does with more calls than Python can take at once."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tritonclient.grpc import service_pb2

from protos.zserve.v1 import image_generation_pb2
from server.cli import parser, read_config
from server.errors import ConfigError, TooManyCallsError
from server.rpc.access import PROTOCOL_OF, AccessInterceptor
from server.rpc.listen import bind, make_server, transport_options
from server.settings import GrpcConfig, Protocol, Restriction, TlsConfig

BURST = 4000  # calls; where nobody says otherwise, gRPC keeps none beyond 3,000


class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers any call with its request."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(echo)


async def echo(request: bytes, context: object) -> bytes:
    return request


async def test_no_call_of_a_burst_is_dropped_before_the_server_has_seen_it() -> None:
    config = GrpcConfig("127.0.0.1", port=0)
    server = make_server(config, [])
    server.add_generic_rpc_handlers((Echo(),))
    port = bind(server, config)
    await server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/a/call")
        calls = [call.future(b"") for _ in range(BURST)]  # the server's event loop, which takes them, stands meanwhile
        failures = await asyncio.to_thread(lambda: [made.exception() for made in calls])
    await server.stop(None)
    assert [f.details() for f in failures if f is not None] == []


async def test_a_certificate_that_is_none_is_not_taken_for_a_port_that_is_not_free(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    key.write_text("nonsense")
    config = GrpcConfig("127.0.0.1", port=0, tls=TlsConfig(cert, key))
    with pytest.raises(ConfigError, match=f"cannot use {cert} with {key}"):
        bind(make_server(config, []), config)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::"])
async def test_an_address_is_one_of_either_family(address: str) -> None:
    config = GrpcConfig(address, port=0)
    server = make_server(config, [])
    try:
        assert bind(server, config) > 0
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (
            "",
            {
                "grpc.so_reuseport": 0,
                "grpc.keepalive_time_ms": 7_200_000,
                "grpc.keepalive_timeout_ms": 20_000,
                "grpc.keepalive_permit_without_calls": 0,
                "grpc.http2.max_pings_without_data": 2,
                "grpc.http2.min_ping_interval_without_data_ms": 300_000,
                "grpc.http2.max_ping_strikes": 2,
            },
        ),
        (
            "--grpc-keepalive-time 1 --grpc-keepalive-timeout 2 --grpc-keepalive-permit-without-calls true "
            "--grpc-http2-max-pings-without-data 3 --grpc-http2-min-recv-ping-interval-without-data 4 "
            "--grpc-http2-max-ping-strikes 5 --grpc-max-connection-age 6 --grpc-max-connection-age-grace 7",
            {
                "grpc.keepalive_time_ms": 1,
                "grpc.keepalive_timeout_ms": 2,
                "grpc.keepalive_permit_without_calls": 1,
                "grpc.http2.max_pings_without_data": 3,
                "grpc.http2.min_ping_interval_without_data_ms": 4,
                "grpc.http2.max_ping_strikes": 5,
                "grpc.max_connection_age_ms": 6,
                "grpc.max_connection_age_grace_ms": 7,
            },
        ),
    ],
)
def test_flags_of_the_transport_have_tritons_names_and_defaults(flags: str, options: dict[str, int]) -> None:
    told = dict(transport_options(read_config(parser().parse_args(flags.split())).grpc))
    assert {name: told.get(name) for name in options} == options
    assert ("grpc.max_connection_age_ms" in told) is ("age" in flags)


def test_every_call_of_the_services_is_in_a_group() -> None:
    services = (
        image_generation_pb2.DESCRIPTOR.services_by_name["ImageGeneration"],
        service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    )
    methods = {method.name for service in services for method in service.methods}
    not_served = {"List"}  # of the health service
    assert methods - not_served == PROTOCOL_OF.keys()
    assert {m for m, p in PROTOCOL_OF.items() if p is Protocol.INFERENCE} == {
        *("ModelInfer", "ModelStreamInfer", "Generate", "GenerateImage")
    }


RIGHT, WRONG = Restriction(frozenset({Protocol.HEALTH}), "a", "1"), Restriction(frozenset({Protocol.HEALTH}), "b", "2")


@pytest.mark.parametrize("restrictions", [(RIGHT, WRONG), (WRONG, RIGHT)])
@pytest.mark.parametrize(
    ("method", "given", "passes"),
    [
        ("ServerLive", {"a": "1", "b": "2"}, True),
        ("ServerLive", {"a": "1"}, False),
        ("ServerLive", {"a": "1", "b": "3"}, False),
        ("ModelInfer", {}, True),  # is of another group
        ("Unheard", {}, False),  # and this of none
        ("Unheard", {"a": "1", "b": "2"}, True),
    ],
)
async def test_a_call_has_to_meet_every_restriction_of_its_group(
    restrictions: tuple[Restriction, ...], method: str, given: dict[str, str], passes: bool
) -> None:
    """Whatever their order."""
    access = AccessInterceptor(GrpcConfig(restrictions=restrictions))
    details = SimpleNamespace(method=f"/inference.GRPCInferenceService/{method}", invocation_metadata=given.items())
    answer = object()
    found = await access.intercept_service(AsyncMock(return_value=answer), details)  # type: ignore[arg-type]
    assert (found is answer) == passes


def from_peer(peer: str) -> Any:
    return SimpleNamespace(peer=lambda: peer)


async def test_a_clients_share_is_one_for_all_of_its_connections_and_free_again_after_a_call() -> None:
    access = AccessInterceptor(GrpcConfig(max_calls_per_client=1))
    async with access._place(None, from_peer("ipv4:10.0.0.1:1111")):
        with pytest.raises(TooManyCallsError, match="1 inference calls of this client are open"):
            async with access._place(None, from_peer("ipv4:10.0.0.1:2222")):
                pass
        async with access._place(None, from_peer("ipv4:10.0.0.2:1111")):
            pass
    async with access._place(None, from_peer("ipv4:10.0.0.1:2222")):
        pass


async def test_calls_other_than_inference_are_not_counted() -> None:
    """A client with all of its calls open is still told that the server lives."""
    access, answer = AccessInterceptor(GrpcConfig(max_calls_per_client=1)), object()
    details = SimpleNamespace(method="/inference.GRPCInferenceService/ServerLive", invocation_metadata=())
    found = await access.intercept_service(AsyncMock(return_value=answer), details)  # type: ignore[arg-type]
    assert found is answer
