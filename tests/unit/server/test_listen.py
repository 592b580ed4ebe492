"""A gRPC server on its port: what its transport does with more calls than Python can take at once."""

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest

from server.errors import ConfigError
from server.rpc.listen import bind, make_server
from server.settings import GrpcConfig, TlsConfig

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
