"""On two NVIDIA GPUs: a worker on each, which draw the same, share the work, and stand in for each other.

Run by `make test-gpu`; needs no plugin of pytest.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from client.messages import ImageRequest
from export.manifest import Backend
from server.frontend.workers import Worker, WorkerState
from server.requests import Image, ImageFormat
from server.worker.images import Pixels
from tests.conftest import MODEL, ROOT, run_export
from tests.fakes import a_request
from tests.integration.frontend import Running, draw, make_repository, serving

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
T = TypeVar("T")
CONFIG = """
max_batch_size: 4
instance_group { kind: KIND_GPU gpus: [0, 1] }
parameters { key: "default_size" value { string_value: "256x256" } }
"""
DEVICES = ["cuda:0", "cuda:1"]
REQUESTS = 48
LEAST_TAKEN = 200 << 20  # bytes of a GPU; CUDA's context and the engines of the demo take more


@dataclass(frozen=True)
class Server:
    """One that runs between the tests' calls, on a loop of its own, and what each GPU had free before it started."""

    running: Running
    runner: asyncio.Runner
    free: list[int]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @property
    def workers(self) -> list[Worker]:
        return sorted(self.running.workers, key=lambda worker: worker.config.device)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    done = run_export("--repository", "models", "--name", MODEL, "--default-size", "256x256")  # as `make demo`
    assert done.returncode == 0, done.stderr
    models = make_repository(ROOT / "models" / MODEL, tmp_path_factory.mktemp("gpus") / "models", CONFIG)
    free = [torch.cuda.mem_get_info(device)[0] for device in DEVICES]
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        running = runner.run(stack.enter_async_context(serving(models)))
        yield Server(running, runner, free)
        runner.run(stack.aclose())


def device_of(worker: Worker) -> str:
    """What its process says."""
    assert worker.info is not None, worker.reason
    return worker.info.device.partition(" ")[0]


async def picture(worker: Worker, seed: int) -> Pixels:
    """What this worker draws, past the queue."""
    request = replace(
        a_request(), model=MODEL, width=256, height=256, num_inference_steps=8, seed=seed, image_format=ImageFormat.RAW
    )
    (image,) = [event async for event in worker.generate(request) if isinstance(event, Image)]
    return np.frombuffer(image.data, np.uint8).reshape(256, 256, 3)


async def drawn(server: Server, first: int) -> list[tuple[str, int, bytes]]:
    """Many requests at once: of each the worker that drew it, the attempts it took, and the picture."""
    requests = [ImageRequest("a red circle", seed=first + n, image_format="raw") for n in range(REQUESTS)]
    seen = await asyncio.gather(*(draw(server.running.client, request) for request in requests))
    for one in seen:
        (completed,) = one.of("completed")
        assert {(e.backend, e.fallback_reason) for e in completed.engines} == {(Backend.AOTINDUCTOR, "")}
    starts = [one.of("started") for one in seen]
    return [(s[-1].instance, len(s), one.of("image")[0].data) for s, one in zip(starts, seen, strict=True)]


def test_each_gpu_has_a_worker_of_its_own(server: Server) -> None:
    assert [device_of(worker) for worker in server.workers] == DEVICES
    free = [torch.cuda.mem_get_info(device)[0] for device in DEVICES]
    taken = [before - now for before, now in zip(server.free, free, strict=True)]
    assert min(taken) > LEAST_TAKEN, taken
    assert max(taken) < 1.5 * min(taken), "both have what one worker has"


def test_both_draw_the_same(server: Server) -> None:
    first, second = server.workers
    for seed in range(4):
        a, b = (server.run(picture(worker, seed)).astype(int) for worker in (first, second))
        assert np.abs(a - b).max() <= 1, "grey levels"
        assert np.ptp(a) > 0


def test_both_take_their_share(server: Server) -> None:
    by_worker = Counter(instance for instance, _, _ in server.run(drawn(server, first=0)))
    assert set(by_worker) == {worker.config.instance for worker in server.workers}
    assert min(by_worker.values()) >= REQUESTS / 4, by_worker


def test_one_that_is_lost_is_stood_in_for_and_replaced_on_its_gpu(server: Server) -> None:
    lost = server.workers[1]
    before = server.run(picture(lost, 5))

    async def kill() -> int:
        """Once it has begun with something."""
        held = server.running.queue._assignment.held
        await server.running.until(lambda: any(place.started for place in held(lost)))
        assert lost.pid is not None
        killed = lost.pid
        os.kill(killed, signal.SIGKILL)
        return killed

    async def both() -> tuple[list[tuple[str, int, bytes]], int]:
        return await asyncio.gather(drawn(server, first=100), kill())

    answers, killed = server.run(both())
    assert len(answers) == REQUESTS
    assert max(attempts for _, attempts, _ in answers) == 2, "it had begun with some"
    server.run(server.running.until(lambda: lost.state is WorkerState.READY and lost.pid not in (None, killed)))
    assert (device_of(lost), lost.restarts) == ("cuda:1", 1)
    assert np.abs(server.run(picture(lost, 5)).astype(int) - before).max() <= 1
