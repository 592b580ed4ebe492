"""What does a finished 1024x1024 image cost on its way from the worker's pixels to the client?

Method: the server's own frontend and a worker process without a model, which answers every request with the same
picture (the contact sheet with the noise of a photograph), encoded as the real worker does. Each format is asked for
in three ways in turn, N times each, so that a drift of the machine's speed affects all of them: the worker's own
socket, the frontend's image service, and Triton's ModelInfer. Every answer is compared with the picture after its time
has been taken.

Units: milliseconds. `encode` is the encoding alone, as the worker measured it; the others are a whole call, encoding
included. `..._cpu` is the processor time of client, frontend and worker together for one call, which other work on the
machine hardly affects.
"""

import argparse
import asyncio
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import psutil
import tritonclient.grpc as triton
from PIL import Image as PillowImage

from benchmarks.record import BenchmarkError, Row, percentiles, print_table, row, shown
from benchmarks.serving import wait_until
from client import ZImageClient
from client.messages import ImageRequest
from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc
from server.config import ServeConfig
from server.frontend.app import Frontend
from server.heap import keep_freed_memory
from server.launch import WorkerConfig
from server.requests import (
    Completed,
    Event,
    GenerationRequest,
    Image,
    ImageFormat,
    InstanceInfo,
    MemoryUse,
    Started,
    Timings,
)
from server.rpc.images import CHANNEL_OPTIONS, ImageGenerationServicer
from server.service import ModelStatus
from server.settings import GrpcConfig
from server.worker.images import Pixels, encode_image

SIZE, PORT, MODEL = 1024, 9821, "picture"
PROMPT = "a picture"
COMMAND = (sys.executable, "-P", "-m", "benchmarks.image_transfer")
FORMATS = ("raw", "jpeg", "webp", "png")
TARGETS = {"raw": 10.0, "jpeg": 15.0, "png": 60.0}  # ms, of the slower of the two services


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    parser.add_argument("-n", type=int, default=60, help="calls a format and way (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints the table."""
    with tempfile.TemporaryDirectory() as scratch, running(Path(scratch)) as server:
        socket = next(Path(scratch).glob("*.sock"))
        ways = {"worker": image_service(f"unix:{socket}"), "zserve": image_service(f"127.0.0.1:{PORT}")}
        calls: dict[str, Callable[[str], Answer]] = {**ways, "triton": triton_service(f"127.0.0.1:{PORT}")}
        rows = [row({"format": f}, **format_costs(f, calls, options.n, server)) for f in FORMATS]
    columns = ("encode", "worker", "zserve", "triton")
    header = ("format", *(f"{c} {p}" for c in columns for p in ("p50", "p99")), "CPU zserve", "CPU triton")
    print_table(header, [_line(r, columns) for r in rows])
    return {"settings": {"size": [SIZE, SIZE], "targets_ms": TARGETS}, "rows": rows}


def _line(r: Row, columns: tuple[str, ...]) -> list[object]:
    times = (time for column in columns for time in shown(r[column], 50, 99))
    return [r["case"]["format"], *times, r["zserve_cpu"], r["triton_cpu"]]


Answer = tuple[bytes, float]  # the image's bytes, and the ms that encoding them took


def image_service(url: str) -> Callable[[str], Answer]:
    """A caller of the image service."""
    client = ZImageClient(url)

    def call(image_format: str) -> Answer:
        events = list(client.generate(ImageRequest(PROMPT, image_format=image_format, seed=1)))
        return events[-2].image.data, events[-1].completed.timings.image_encode_ms

    return call


def triton_service(url: str) -> Callable[[str], Answer]:
    """A caller of Triton's ModelInfer."""
    client = triton.InferenceServerClient(url)
    prompt = triton.InferInput("PROMPT", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([PROMPT.encode()], dtype=object))

    def call(image_format: str) -> Answer:
        result = client.infer(MODEL, [prompt], parameters={"image_format": image_format, "seed": 1})
        found = result.as_numpy("IMAGE")
        data = found.tobytes() if image_format == "raw" else found[0]
        return data, result.get_response().parameters["image_encode_ms"].double_param

    return call


def format_costs(
    image_format: str, calls: dict[str, Callable[[str], Answer]], count: int, server: psutil.Process
) -> dict[str, Any]:
    """All figures of one format."""
    for call in calls.values():
        for _ in range(3):
            check(image_format, call(image_format)[0])
    spent: dict[str, list[float]] = {way: [] for way in calls}
    processor: dict[str, float] = dict.fromkeys(calls, 0.0)
    encode = []
    for _ in range(count):
        for way, call in calls.items():
            before, began = processor_seconds(server), time.perf_counter()
            data, encode_ms = call(image_format)
            spent[way].append(1e3 * (time.perf_counter() - began))
            processor[way] += processor_seconds(server) - before
            encode.append(encode_ms)
            check(image_format, data)
    cpu = {f"{way}_cpu": 1e3 * seconds / count for way, seconds in processor.items()}
    return {"encode": percentiles(encode)} | {way: percentiles(values) for way, values in spent.items()} | cpu


def processor_seconds(server: psutil.Process) -> float:
    """Processor time of this process and the server's two so far."""
    times = [p.cpu_times() for p in (server, *server.children())]
    return time.process_time() + sum(t.user + t.system for t in times)


@cache  # equal answers are decoded once, so that calls are not timed right after other work
def check(image_format: str, data: bytes) -> None:
    """Ends the benchmark unless `data` is the picture."""
    if image_format == "raw":
        found = np.frombuffer(data, np.uint8).reshape(SIZE, SIZE, 3)
    else:
        found = np.asarray(PillowImage.open(io.BytesIO(data)).convert("RGB"))
    worst = np.abs(found.astype(int) - picture()).mean()
    if worst > (0 if image_format in ("raw", "png") else 6):
        raise BenchmarkError(f"{image_format}: not the picture that was sent (mean difference {worst:.2f})")


def picture() -> Pixels:
    """uint8 [1024, 1024, 3]: the contact sheet, with noise of 3 grey levels."""
    sheet = PillowImage.open(Path(__file__).parent.parent / "docs" / "contact-sheet.png").convert("RGB")
    clean = np.asarray(sheet.resize((SIZE, SIZE), PillowImage.Resampling.BICUBIC), dtype=np.float32)
    noise = np.random.default_rng(0).normal(0, 3, clean.shape)
    return np.clip(clean + noise, 0, 255).astype(np.uint8)


@contextmanager
def running(scratch: Path) -> Iterator[psutil.Process]:
    """The frontend process over a model that is only a name."""
    (scratch / "models" / MODEL / "1").mkdir(parents=True)
    (scratch / "models" / MODEL / "config.pbtxt").touch()
    with subprocess.Popen([*COMMAND, "frontend", str(scratch)]) as process:
        try:
            client = triton.InferenceServerClient(f"127.0.0.1:{PORT}")
            wait_until(client.is_server_ready, process)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)


async def serve_frontend(scratch: Path) -> None:
    """The server's own frontend; its workers are this module's."""
    keep_freed_memory(arenas=1)
    config = ServeConfig(scratch / "models", grpc=GrpcConfig("127.0.0.1", PORT), allow_metrics=False)
    await Frontend(config, scratch, (*COMMAND, "worker")).run()


class PictureService:
    """The `ImageService` of a worker without a model."""

    def __init__(self, config: WorkerConfig) -> None:
        self._model = config.model
        self._info = InstanceInfo(config.instance, "cpu", "1", "fp32", (), MemoryUse(), ())
        self._pool = ThreadPoolExecutor(2)
        self._picture = picture()

    def model(self, name: str) -> ModelStatus:
        """See `ImageService`."""
        return ModelStatus(self._model, (self._info,), ready=True)

    def models(self) -> list[ModelStatus]:
        """See `ImageService`."""
        return [self.model("")]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See `ImageService`."""
        yield Started(self._info.name)
        began = time.perf_counter()
        data = await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, request)
        encode_ms = 1e3 * (time.perf_counter() - began)
        yield Image(0, request.seed, SIZE, SIZE, request.image_format, data)
        yield Completed(Timings(image_encode_ms=encode_ms), (), prompt_cached=False, denoiser_forwards=0)

    def _encode(self, request: GenerationRequest) -> bytes:
        return encode_image(self._picture, ImageFormat(request.image_format), request.quality)


async def serve_picture(config: WorkerConfig) -> None:
    """Serves on the worker's socket until the process is told to end."""
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    pb_grpc.add_ImageGenerationServicer_to_server(ImageGenerationServicer(PictureService(config)), server)
    server.add_insecure_port(f"unix:{config.socket}")
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    """The benchmark's other two processes: `worker`, with the frontend's arguments for a worker, or `frontend`."""
    if sys.argv[1] == "worker":
        asyncio.run(serve_picture(WorkerConfig.parse(sys.argv[2:])))
    else:
        asyncio.run(serve_frontend(Path(sys.argv[2])))


if __name__ == "__main__":
    main()
