"""Does a worker stay as it was? Memory over 500 requests of mixed sizes, and the 50th image in a row against the 2nd.

Method: one server over one exported model with one worker. 500 requests, four at a time, of six sizes that were warmed
up, 1 to 4 steps, some with guidance or two images, some cancelled midway; the worker's memory after every 50. Then the
model is unloaded, and the worker has to exit. On CUDA device memory is recorded too: of the whole device (which nothing
else may use) before the server starts, with the model loaded, after every 50 requests and when it is unloaded; of the
worker, where the driver reports it; and the peak that the worker reports itself. Then, on a new worker each time, a row
of 50 equal images at --size, 8 steps, one after the other: of each row the 50th image's latency over the 2nd's, the
3rd's over the 2nd's as a measure of the noise, and the 99th percentile over the median from the 2nd on.

Units: MiB, milliseconds, ratios. `growth` is from the 100th to the last request: before that, most shapes are used for
the first time. It may be 2 % plus 64 MiB, of the host and of the device, and 64 MiB of the device may stay in use when
the model is unloaded; the command fails beyond. The 50th is as fast as the 2nd if both ratios have the same median and
spread.
"""

import argparse
import asyncio
import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc.aio as triton

from benchmarks import choice
from benchmarks.device_memory import process_mib, used_mib
from benchmarks.record import BenchmarkError, percentiles, print_table, row, shown
from benchmarks.serving import NAME, add_model, frontend, only_backend, repository
from benchmarks.traffic import check_engines
from client import AsyncZImageClient
from client.messages import ImageRequest
from export.devices import checked_device
from export.spec import pixels
from server.config import ControlMode
from server.engines.memory import MIB
from server.frontend.workers import Worker

SIZES = {
    "cpu": ((64, 64), (96, 64), (128, 128), (64, 160), (192, 128), (256, 256)),
    "cuda": ((64, 64), (128, 128), (256, 256), (192, 320), (512, 384), (512, 512)),
}
REQUESTS, EVERY, ROW = 500, 50, 50
GROWTH, SLACK = 0.02, 64.0  # that memory may grow by: a share of it, plus MiB
GONE_SECONDS = 60.0  # within which an unloaded model's worker has to be gone
SETTLING = 2.0  # seconds that the driver is given to reclaim a process's memory


@dataclass(frozen=True)
class Held:
    """A worker's memory at one moment, MiB; of a device only where there is one that reports it."""

    resident: float
    device: float | None  # of the whole device
    of_worker: float | None  # the worker's part of that, as the driver reports it
    peak: float | None  # the most the worker has reserved there, by its own report, up to a second old


@dataclass(frozen=True)
class Life:
    """The device's memory before a model is there and after it, MiB, and the worker's while it serves."""

    before: float | None
    loaded: Held
    serving: list[Held]  # after every `EVERY` requests
    unloaded: float | None


def requests(seed: int, sizes: tuple[tuple[int, int], ...]) -> list[ImageRequest]:
    """All sizes, lengths, counts and guidance, in random order."""
    rng = random.Random(seed)
    return [
        ImageRequest(
            f"a red circle number {number}",
            width=width,
            height=height,
            num_inference_steps=rng.randint(1, 4),
            guidance_scale=rng.choice((0.0, 0.0, 0.0, 1.5)),
            num_images=rng.choice((1, 1, 1, 2)),
            seed=number,
        )
        for number, (width, height) in enumerate(rng.choices(sizes, k=REQUESTS))
    ]


async def send(client: AsyncZImageClient, request: ImageRequest, number: int, backend: str) -> None:
    """One request; every ninth client leaves in the middle."""
    async for event in client.generate(request):
        if number % 9 == 0 and event.HasField("progress"):
            return
        if event.HasField("completed"):
            check_engines(event.completed, backend)


def held(worker: Worker, device: str) -> Held:
    """The memory that `worker` holds now."""
    assert worker.pid is not None, "it is ready"
    resident = round(psutil.Process(worker.pid).memory_info().rss / MIB, 1)
    if not device.startswith("cuda"):
        return Held(resident, None, None, None)
    assert worker.info is not None, "it is ready"
    return Held(resident, used_mib(device), process_mib(worker.pid), round(worker.info.memory.device_peak / MIB, 1))


async def mixed(client: AsyncZImageClient, worker: Worker, options: argparse.Namespace, backend: str) -> list[Held]:
    """The worker's memory after every `EVERY` requests."""
    work, found = requests(3, SIZES[options.device.partition(":")[0]]), []
    for first in range(0, REQUESTS, 4):
        await asyncio.gather(*(send(client, r, first + n, backend) for n, r in enumerate(work[first : first + 4])))
        if (first + 4) % EVERY < 4:
            found.append(await asyncio.to_thread(held, worker, options.device))
    return found


async def unload(url: str, worker: Worker) -> None:
    """Unloads the model as its operator does, and waits until its worker is gone.

    Raises:
        BenchmarkError: the worker was replaced meanwhile, or does not exit.
    """
    if worker.restarts:
        raise BenchmarkError(f"the worker was replaced {worker.restarts} times: {worker.reason}")
    process = psutil.Process(worker.pid)
    async with triton.InferenceServerClient(url) as control:
        await control.unload_model(NAME)
    if not await asyncio.to_thread(ends, process):
        raise BenchmarkError(f"the worker outlived its model by {GONE_SECONDS:g} s")


def ends(process: psutil.Process) -> bool:
    """Whether `process` ends in time; only polled, as its exit status is the frontend's to collect."""
    until = time.monotonic() + GONE_SECONDS
    while (running := process.is_running()) and time.monotonic() < until:
        time.sleep(0.1)
    return not running


async def row_of_equals(client: AsyncZImageClient, size: str, backend: str) -> list[float]:
    """Milliseconds of each of `ROW` equal images."""
    width, height = pixels(size)
    taken = []
    for number in range(ROW):
        drawing = await client.draw("a blue star", width=width, height=height, num_inference_steps=8, seed=number)
        check_engines(drawing.completed, backend)
        taken.append(drawing.completed.timings.total_ms)
    return taken


async def soak(options: argparse.Namespace, backend: str) -> Life:
    """One worker's life, from before its model is loaded until it is unloaded.

    Raises:
        BenchmarkError: the model cannot be loaded, its worker was replaced, or it outlives its model.
    """
    device = options.device
    before = used_mib(device)
    sizes = ["x".join(map(str, size)) for size in SIZES[device.partition(":")[0]]]
    with repository(options.model, [options.size, *sizes]) as models:
        async with (
            frontend(models, device=device, control=ControlMode.EXPLICIT) as (url, server),
            AsyncZImageClient(url) as client,
        ):
            if not server.queues:
                raise BenchmarkError(f"--model {options.model} cannot be loaded, for the reason above")
            (worker,) = server.queues[0].workers
            loaded = held(worker, device)
            serving = await mixed(client, worker, options, backend)
            await unload(url, worker)
            await asyncio.sleep(SETTLING if before is not None else 0)
            return Life(before, loaded, serving, used_mib(device))


async def rows_of_equals(options: argparse.Namespace, backend: str) -> list[list[float]]:
    """Latencies of each row, ms, each on a worker that has only been warmed up."""
    found = []
    with repository(options.model, [options.size]) as models:
        for _ in range(options.rows):
            async with frontend(models, device=options.device) as (url, _), AsyncZImageClient(url) as client:
                found.append(await row_of_equals(client, options.size, backend))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    add_model(parser)
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--size", type=choice.size, default="128x128", help="of the equal images (default: %(default)s)"
    )
    parser.add_argument("--rows", type=choice.positive, default=12, help="of 50 images (default: %(default)s)")


def too_much(life: Life) -> list[str]:
    """What is past the limits that the benchmark states."""
    first, last = life.serving[1], life.serving[-1]
    grown = {"the worker": (first.resident, last.resident), "the device": (first.device, last.device)}
    found = [
        f"{what} went from {before} to {after} MiB"
        for what, (before, after) in grown.items()
        if before is not None and after is not None and after > (1 + GROWTH) * before + SLACK
    ]
    if life.before is not None and life.unloaded is not None and life.unloaded > life.before + SLACK:
        found.append(f"the device had {life.before} MiB taken before the model was loaded, and {life.unloaded} after")
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs and prints the figures.

    Raises:
        BenchmarkError: as `soak`, or another engine answered.
        UnsupportedError: there is no such device.
    """
    checked_device(options.device)
    backend = only_backend(options.model)
    life = asyncio.run(soak(options, backend))
    failed = too_much(life)
    latencies = asyncio.run(rows_of_equals(options, backend))
    figures = {"growth_mib": round(life.serving[-1].resident - life.serving[1].resident, 1)}
    print(f"memory after every {EVERY} requests, MiB: {[h.resident for h in life.serving]}")
    if life.before is not None:
        figures |= _device_figures(life)
    print(f"since the second: {figures}", *(f"TOO MUCH: {what}" for what in failed), sep="\n")
    later = {
        f"{name}_over_second": percentiles([times[index] / times[1] for times in latencies])
        for name, index in (("third", 2), ("fiftieth", ROW - 1))
    }
    later["p99_over_median"] = percentiles([np.percentile(times[1:], 99) / np.median(times[1:]) for times in latencies])
    print_table(("ratio", "p10", "p50", "p90"), [(name, *shown(p, 10, 50, 90)) for name, p in later.items()])
    second = percentiles([times[1] for times in latencies])
    return {
        "settings": {
            "engine": backend,
            **choice.version_settings(options.model, options.device),
            "requests": REQUESTS,
            "rows": options.rows,
            "row": ROW,
            "size": options.size,
            "growth_limit": {"share": GROWTH, "mib": SLACK},
        },
        "memory_mib": asdict(life),
        "rows": [row({"what": "soak"}, **figures, second_ms=second, **later)],
        "failed": failed,
    }


def _device_figures(life: Life) -> dict[str, float]:
    """The figures of the whole device; prints them too."""
    told = [h.device or 0.0 for h in life.serving]
    before, after = life.before or 0.0, life.unloaded or 0.0
    print(f"of the device, MiB: {before} before, {life.loaded.device} loaded, {told}, {after} unloaded")
    return {"device_growth_mib": round(told[-1] - told[1], 1), "device_not_given_back_mib": round(after - before, 1)}
