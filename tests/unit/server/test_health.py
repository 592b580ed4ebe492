"""grpc.health.v1: every watcher is told, whatever the others do."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.rpc.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING, Health
from server.rpc.interceptors import ErrorInterceptor

PATIENCE = 30.0  # seconds for what takes milliseconds
HEADERS, DATA, SETTINGS, WINDOW_SIZE, END_STREAM, END_HEADERS = 1, 0, 4, 4, 1, 4  # of HTTP/2 (RFC 9113)


@asynccontextmanager
async def served(health: Health) -> AsyncIterator[tuple[str, health_pb2_grpc.HealthStub]]:
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    health.add_to(server)
    url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(url) as channel:
        yield url, health_pb2_grpc.HealthStub(channel)
    await server.stop(None)


def request(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def test_a_watcher_that_leaves_does_not_keep_the_others_from_being_told() -> None:
    health = Health()
    async with served(health) as (_, stub):
        leaving, staying = (stub.Watch(request(), timeout=PATIENCE) for _ in range(2))
        assert [(await watch.read()).status for watch in (leaving, staying)] == [NOT_SERVING, NOT_SERVING]
        leaving.cancel()
        later = stub.Watch(request(), timeout=PATIENCE)  # by when it is answered, the other's end has been seen
        assert (await later.read()).status == NOT_SERVING
        health.set(serving=True)
        assert (await staying.read()).status == SERVING
        health.set(serving=True)  # no news
        health.set(serving=False)
        assert (await staying.read()).status == NOT_SERVING


async def test_a_watcher_that_takes_nothing_does_not_keep_the_others_from_being_told() -> None:
    health = Health()
    async with served(health) as (url, stub):
        reader, writer = await asyncio.open_connection(*url.split(":"))
        writer.write(watching_without_room())
        await headers_of_an_answer(reader)
        watch = stub.Watch(request(), timeout=PATIENCE)
        assert (await watch.read()).status == NOT_SERVING
        health.set(serving=True)
        assert (await watch.read()).status == SERVING
        assert (await stub.Check(request(), timeout=PATIENCE)).status == SERVING
        writer.close()


async def test_a_service_that_there_is_not_may_be_watched_and_not_checked() -> None:
    async with served(Health()) as (_, stub):
        watch = stub.Watch(request("no.such.Service"), timeout=PATIENCE)
        assert (await watch.read()).status == SERVICE_UNKNOWN
        with pytest.raises(grpc.aio.AioRpcError, match=r"no service 'no.such.Service'") as caught:
            await stub.Check(request("no.such.Service"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def headers_of_an_answer(reader: asyncio.StreamReader) -> None:
    """Returns when they have come; no window holds them back."""
    kind = None
    while kind != HEADERS:
        head = await asyncio.wait_for(reader.readexactly(9), PATIENCE)
        kind = head[3]
        await reader.readexactly(int.from_bytes(head[:3]))


def watching_without_room() -> bytes:
    """A connection that calls Watch, and grants the answers a window of no bytes."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/grpc.health.v1.Health/Watch",
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(SETTINGS, 0, 0, struct.pack(">HI", WINDOW_SIZE, 0))
        + frame(HEADERS, END_HEADERS, 1, b"".join(b"\0" + text(name) + text(value) for name, value in fields.items()))
        + frame(DATA, END_STREAM, 1, bytes(5))
    )


def text(value: str) -> bytes:
    return bytes([len(value)]) + value.encode()


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body
