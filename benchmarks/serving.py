"""Servers to be measured: in a process of its own as its users start it, or with the frontend in this process."""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import grpc
import psutil
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.choice import BACKENDS, PIPELINES
from benchmarks.record import BenchmarkError
from demo.run import free_port
from export.manifest import FILE_NAME, Backend, Manifest
from export.repository import versions
from export.spec import Component
from server.config import ControlMode, ServeConfig
from server.frontend.app import Frontend
from server.frontend.workers import COMMAND
from server.settings import GrpcConfig

NAME = "model"
START_SECONDS = 600
# All three: the delay before the next attempt grows up to the last value, which is how late the answer may be seen.
EAGER_TO_CONNECT = [
    ("grpc.min_reconnect_backoff_ms", 10),
    ("grpc.initial_reconnect_backoff_ms", 10),
    ("grpc.max_reconnect_backoff_ms", 20),
]
CONFIG = """
max_batch_size: {max_batch}
instance_group {{ count: {workers} {where} }}
parameters {{ key: "default_size" value {{ string_value: "{size}" }} }}
parameters {{ key: "warmup_sizes" value {{ string_value: "{sizes}" }} }}
"""


@dataclass(frozen=True)
class Running:
    """A server that is ready: where it answers, its process, and how long it took from the process's start."""

    url: str
    process: psutil.Process
    health_ms: float  # until health was answered
    ready_ms: float  # until it was SERVING, that is, warmed up


def add_model(parser: argparse.ArgumentParser) -> None:
    """The option that says which exported model is measured; `options.model` is a version of it."""
    parser.add_argument(
        "--model",
        type=newest_version,
        default="models/z-image-demo",
        help="an exported model, or one version of it (default: the newest of %(default)s)",
    )


def newest_version(text: str) -> Path:
    """The folder itself if it is a version, otherwise the newest version in it.

    Raises:
        ArgumentTypeError: it is neither.
    """
    folder = Path(text)
    if (folder / FILE_NAME).is_file():
        return folder
    if not (found := versions(folder)):
        raise argparse.ArgumentTypeError(f"{folder} is no exported model; `make export` makes models/z-image-demo")
    return folder / str(found[-1])


def only_backend(version: Path) -> str:
    """The one backend of a version's engines.

    Raises:
        BenchmarkError: they are of several backends, or some component has none.
    """
    engines = Manifest.read(version).engines
    backends = {record.backend for record in engines} or {Backend.EAGER}
    if len(backends) > 1 or len(engines) not in (0, len(Component)):
        raise BenchmarkError(
            f"{version} has engines of {', '.join(sorted(backends))}; one backend is measured at a time"
        )
    return backends.pop().value


def served_rows(backends: Iterable[str]) -> list[str]:
    """Those of `backends` that a server can run.

    Raises:
        BenchmarkError: there is none.
    """
    if not (found := [b for b in backends if b not in PIPELINES]):
        others = ", ".join(b for b in BACKENDS if b not in PIPELINES)
        raise BenchmarkError(
            f"--backend: no server has {' or '.join(PIPELINES)} for an engine, so there is nothing to measure; "
            f"{others} are accepted"
        )
    return found


@contextmanager
def repository(
    version: Path, sizes: Sequence[str], *, workers: int = 1, gpus: int = 1, max_batch: int = 4
) -> Iterator[Path]:
    """A model repository that holds only one version, which warms up `sizes`; the first is its default.

    `workers` serve it where the server's --device says, or on each of several GPUs.
    """
    where = "kind: KIND_AUTO" if gpus == 1 else f"kind: KIND_GPU gpus: {list(range(gpus))}"
    with tempfile.TemporaryDirectory(prefix="zserve-bench-") as folder:
        model = Path(folder) / "models" / NAME
        model.mkdir(parents=True)
        (model / "1").symlink_to(version.resolve())
        text = CONFIG.format(max_batch=max_batch, workers=workers, where=where, size=sizes[0], sizes=",".join(sizes))
        (model / "config.pbtxt").write_text(text)
        yield model.parent


@contextmanager
def server_process(models: Path, device: str) -> Iterator[Running]:
    """`zserve serve --require-engine`, ready.

    Raises:
        BenchmarkError: it ended, or was not ready after ten minutes; with the end of its log.
    """
    port = free_port()
    address = ("--grpc-address", "127.0.0.1", "--grpc-port", str(port), "--metrics-port", "0", "--device", device)
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "zserve",
                "serve",
                "--model-repository",
                str(models),
                "--require-engine",
                *address,
            ],
            stderr=log,
        )
        try:
            url = f"127.0.0.1:{port}"
            yield Running(url, psutil.Process(process.pid), *_wait(url, process, began, log))
        finally:
            process.terminate()
            process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes], began: float, log: IO[str]) -> tuple[float, float]:
    """Milliseconds since `began` until health was answered, and until it was SERVING."""
    health_ms = None
    with grpc.insecure_channel(url, options=EAGER_TO_CONNECT) as channel:
        listening = grpc.channel_ready_future(channel)
        while process.poll() is None and not _within_a_second(listening):
            pass
        try:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=START_SECONDS)
            for answer in watch:
                now = 1e3 * (time.perf_counter() - began)
                health_ms = health_ms or now
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return health_ms, now
        except grpc.RpcError:
            pass  # the reason is in the log
    log.seek(0)
    raise BenchmarkError(f"the server did not become ready; its log ends with:\n{log.read()[-2000:]}")


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Returns once `ready` returns True; it may raise gRPC's errors while nothing listens yet.

    Raises:
        BenchmarkError: the process ended first, or two minutes have passed.
    """
    end, seen = time.monotonic() + 120, "it answers that it is not ready"
    while process.poll() is None and time.monotonic() < end:
        try:
            if ready():
                return
        except (triton.InferenceServerException, grpc.RpcError) as error:
            seen = str(error)
        time.sleep(0.1)
    raise BenchmarkError(f"the server did not become ready (exit status {process.returncode}): {seen}")


def _within_a_second(future: "grpc.Future[None]") -> bool:
    try:
        future.result(timeout=1)
    except grpc.FutureTimeoutError:
        return False
    return True


@asynccontextmanager
async def frontend(
    models: Path,
    command: Sequence[str] = COMMAND,
    *,
    device: str = "cpu",
    control: ControlMode = ControlMode.NONE,
) -> AsyncIterator[tuple[str, Frontend]]:
    """A frontend in this process whose workers are ready on `device`, and its address; `command` starts a worker.

    Raises:
        BenchmarkError: it ended before the block did, as on SIGTERM and Ctrl-C.
    """
    with tempfile.TemporaryDirectory() as sockets:
        config = ServeConfig(
            models,
            grpc=GrpcConfig("127.0.0.1", port=0),
            metrics_port=0,
            device=device,
            model_control_mode=control,
            load_model=("*",) if control is ControlMode.EXPLICIT else (),
        )
        running = Frontend(config, Path(sockets), command)
        ended = asyncio.create_task(running.run())
        user = asyncio.current_task()
        assert user is not None, "coroutines run in tasks"
        watch = asyncio.create_task(_cancel_at_its_end(user, running, ended))
        try:
            await running.until_ready()
            yield f"127.0.0.1:{running.port}", running
        except asyncio.CancelledError:
            if not watch.done():
                raise
            user.uncancel()
            await ended  # it may say why
            raise BenchmarkError("the server was stopped while it was measured") from None
        finally:
            watch.cancel()
            running.stop()
            await ended


async def _cancel_at_its_end(user: asyncio.Task[Any], running: Frontend, ended: asyncio.Task[int]) -> None:
    stopping = asyncio.create_task(running.until_stopping())
    try:
        await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    user.cancel()
