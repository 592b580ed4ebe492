"""Clients that do not read their answers: nobody else may wait for them."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio as triton

from client.messages import ImageRequest
from tests.conftest import ROOT
from tests.integration.frontend import Running, draw, light_repository, serving
from tests.integration.light_worker import LIGHT
from tests.integration.triton.conftest import bytes_tensor

WINDOW = 2  # requests that the worker has at a time
CONFIG = 'max_batch_size: 1 parameters { key: "default_size" value { string_value: "1024x1024" } }'
UNREAD = 24  # raw images of 3 MB each: more than gRPC and the system keep on the way to a client that does not read
CLIENT = """
import asyncio, sys
from client import AsyncZImageClient, ImageRequest

async def draw(client):
    async for event in client.generate(ImageRequest(sys.argv[2], image_format="raw")):
        pass

async def main():
    async with AsyncZImageClient(sys.argv[1]) as client:
        await asyncio.gather(*(draw(client) for _ in range(int(sys.argv[3]))))

asyncio.run(main())
"""


@contextmanager
def client_of(url: str, gate: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that draws `UNREAD` images at a time, which are held until there is a `gate`."""
    with subprocess.Popen([sys.executable, "-c", CLIENT, url, str(gate), str(UNREAD)], cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    async with serving(light_repository(tmp_path / "models", CONFIG), LIGHT) as running:
        yield running


async def test_answers_that_a_client_does_not_read_keep_no_worker(server: Running, tmp_path: Path) -> None:
    gate, figures = tmp_path / "gate", server.queue.statistics
    with client_of(server.url, gate) as stopped:
        await server.until(lambda: figures.under_way == UNREAD)
        stopped.send_signal(signal.SIGSTOP)
        gate.touch()
        assert (await draw(server.client, ImageRequest("anything"))).kinds[-1] == "completed"
        await server.until(lambda: server.queue.running == server.queue.waiting == 0)
        assert figures.under_way > WINDOW
    await server.until(lambda: figures.under_way == 0)


async def test_answers_that_wait_for_an_earlier_one_of_their_stream_keep_no_worker(
    server: Running, tmp_path: Path
) -> None:
    """The first request of the stream has its turn last; the others have no room until they have been answered."""
    gate = tmp_path / "gate"
    holding = [asyncio.create_task(draw(server.client, ImageRequest(str(gate), priority=2))) for _ in range(WINDOW)]
    await server.until(lambda: server.queue.running == WINDOW)

    async def requests():  # type: ignore[no-untyped-def]
        for priority in (8, *(1 for _ in range(2 * WINDOW))):
            inputs = [bytes_tensor("PROMPT", "anything")]
            yield {"model_name": "light", "inputs": inputs, "priority": priority, "request_id": str(priority)}
        await server.until(lambda: server.queue.statistics.under_way == 1 + 3 * WINDOW)
        gate.touch()

    async with triton.InferenceServerClient(server.url) as client:
        answers = [answer async for answer, _ in client.stream_infer(requests())]
    assert [a.get_response().id for a in answers] == ["8"] + ["1"] * 2 * WINDOW
    assert {a.as_numpy("IMAGE").dtype for a in answers} == {np.dtype(np.uint8)}
    await asyncio.gather(*holding)
