"""How a worker process serves what it has loaded, and when it ends: when told to, or when the frontend is gone."""

import asyncio
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc.aio

from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc
from server.rpc.images import CHANNEL_OPTIONS, ImageGenerationServicer
from server.rpc.interceptors import ErrorInterceptor
from server.service import ImageService

STOP_GRACE = 2.0  # seconds for calls to end; the frontend lets requests finish before it stops a worker
STDIN = 0
LOOK_EVERY = 0.2  # seconds between two checks whether the process has been loaded


@contextlib.contextmanager
def ending_with_frontend() -> Iterator[None]:
    """Until it serves, the process ends at once when the frontend is gone: nobody waits for what it loads.

    The next frontend removes its folder, and loads the same, perhaps on the same device.
    """
    loaded = threading.Event()

    def watch() -> None:
        gone = select.poll()
        gone.register(STDIN, 0)  # nothing is read: without events, a poll reports only that the other end is closed
        while not loaded.is_set():
            if gone.poll(1e3 * LOOK_EVERY):
                os._exit(1)

    threading.Thread(target=watch, name="frontend", daemon=True).start()
    try:
        yield
    finally:
        loaded.set()


async def serve(service: ImageService, socket: Path, end_requests: Callable[[], None] = lambda: None) -> None:
    """Serves on `socket` until SIGTERM, or until standard input closes; then `end_requests` fails those under way.

    Left to gRPC they would end with tracebacks in the log.
    """
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=CHANNEL_OPTIONS)
    pb_grpc.add_ImageGenerationServicer_to_server(ImageGenerationServicer(service), server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    await _told_to_stop()
    end_requests()
    await server.stop(STOP_GRACE)


async def _told_to_stop() -> None:
    """Returns on SIGTERM, or when standard input closes. Ctrl-C is the frontend's to handle."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    with contextlib.suppress(ValueError):  # standard input is a plain file: no frontend to watch
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        gone = loop.create_task(reader.read())
        gone.add_done_callback(lambda _: stop.set())
    await stop.wait()
