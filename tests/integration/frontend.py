"""A frontend in this process, with real worker processes: for tests that have to look inside or to break something."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from client import AsyncZImageClient
from client.messages import ImageRequest
from export.repository import versions
from protos.zserve.v1 import image_generation_pb2 as pb
from server.config import ServeConfig
from server.frontend.app import Frontend
from server.frontend.queue import ModelQueue
from server.frontend.workers import COMMAND, Worker
from server.settings import GrpcConfig
from tests.integration.process import PATIENCE

FAULTY = (COMMAND[0], "-m", "tests.integration.faulty_worker")


@dataclass
class Running:
    """What a test gets."""

    frontend: Frontend
    client: AsyncZImageClient
    task: "asyncio.Task[int]"
    url: str
    queue: ModelQueue

    @property
    def workers(self) -> list[Worker]:
        return self.queue.workers

    async def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come about"
            assert not self.task.done(), "the server has ended"
            await asyncio.sleep(0.02)


@dataclass
class Seen:
    """The events of one call."""

    events: list[pb.GenerateEvent] = field(default_factory=list)

    def of(self, kind: str) -> list:
        return [getattr(e, kind) for e in self.events if e.WhichOneof("event") == kind]

    @property
    def kinds(self) -> list[str]:
        return [str(e.WhichOneof("event")) for e in self.events]


async def draw(client: AsyncZImageClient, request: ImageRequest, seen: Seen | None = None) -> Seen:
    """All events of a request; into `seen` as they come."""
    seen = seen or Seen()
    async for event in client.generate(request):
        seen.events.append(event)
    return seen


def make_repository(exported: Path, target: Path, config: str) -> Path:
    """A repository at `target` whose model has the engines of `exported` and a `config.pbtxt` that says `config`."""
    model = target / exported.name
    model.mkdir(parents=True)
    shutil.copytree(exported / str(versions(exported)[-1]), model / "1", copy_function=_link)
    (model / "config.pbtxt").write_text(config)
    return target


def light_repository(target: Path, config: str = "") -> Path:
    """A repository at `target` with a model for `light_worker`, which reads nothing of it."""
    (target / "light" / "1").mkdir(parents=True)
    (target / "light" / "config.pbtxt").write_text(config)
    return target


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(Path(source).resolve())


@asynccontextmanager
async def serving(repository: Path, command: Sequence[str] = COMMAND, **options: object) -> AsyncIterator[Running]:
    """A server over `repository`, ready; stopped in the end, after which no worker may be left.

    Its workers are not given up for being slow, unless `options` say so.
    """
    grpc = GrpcConfig("127.0.0.1", port=0)
    config = ServeConfig(repository, grpc=grpc, metrics_address="127.0.0.1", metrics_port=0)
    config = replace(config, **{"worker_timeout_secs": PATIENCE, **options})  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as sockets:
        frontend = Frontend(config, Path(sockets), command)
        task = asyncio.create_task(frontend.run())
        ready = asyncio.create_task(frontend.until_ready())
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        assert not task.done(), f"the server has ended with {task.result()}"
        url = f"127.0.0.1:{frontend.port}"
        async with AsyncZImageClient(url) as client:
            running = Running(frontend, client, task, url, frontend.queues[0])
            try:
                yield running
            finally:
                pids = [w.pid for w in running.workers]
                frontend.stop()
                await running.task
                assert not any(psutil.pid_exists(pid) for pid in pids if pid is not None)
