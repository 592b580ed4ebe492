"""Does a worker stay as it is? Memory over 500 requests of mixed sizes, and the 50th image in a row against the 2nd.

Method: one server over one exported model with one worker. 500 requests, four at a time, of six sizes, 1 to 4
steps, some with guidance or two images, some of them left in the middle; the worker's resident memory after every 50.
In the end the worker has to be gone with the server. Then, on a new worker each time, 50 equal images at --size, 8
steps, one after the other: of each row the 50th image's latency over the 2nd's, as a measure of what is noise the
3rd's over the 2nd's, and the 99th percentile over the median from the 2nd on.

Units: MiB, milliseconds, ratios. `growth` is from the 100th to the last request: before that, every size has its first
use. The 50th is as fast as the 2nd where both ratios have the same median and spread.
"""

import argparse
import asyncio
import random
from typing import Any

import numpy as np
import psutil

from benchmarks.choice import pixels
from benchmarks.record import BenchmarkError, percentiles, print_table, row
from benchmarks.serving import add_model, backend_of, frontend, repository
from benchmarks.traffic import check_engines
from client import AsyncZImageClient
from client.messages import ImageRequest

SIZES = ((64, 64), (96, 64), (128, 128), (64, 160), (192, 128), (256, 256))
REQUESTS, EVERY, ROW = 500, 50, 50


def requests(seed: int) -> list[ImageRequest]:
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
        for number, (width, height) in enumerate(rng.choices(SIZES, k=REQUESTS))
    ]


async def send(client: AsyncZImageClient, request: ImageRequest, number: int, backend: str) -> None:
    """One request; every ninth client leaves in the middle."""
    async for event in client.generate(request):
        if number % 9 == 0 and event.HasField("progress"):
            return
        if event.HasField("completed"):
            check_engines(event.completed, backend)


async def mixed(client: AsyncZImageClient, worker: psutil.Process, backend: str) -> list[float]:
    """Resident MiB after every `EVERY` requests."""
    work, resident = requests(3), []
    for first in range(0, REQUESTS, 4):
        await asyncio.gather(*(send(client, r, first + n, backend) for n, r in enumerate(work[first : first + 4])))
        if (first + 4) % EVERY < 4:
            resident.append(round(worker.memory_info().rss / 2**20, 1))
    return resident


async def row_of_equals(client: AsyncZImageClient, size: str, backend: str) -> list[float]:
    """Milliseconds of each of `ROW` equal images."""
    width, height = pixels(size)
    taken = []
    for number in range(ROW):
        drawing = await client.draw("a blue star", width=width, height=height, num_inference_steps=8, seed=number)
        check_engines(drawing.completed, backend)
        taken.append(drawing.completed.timings.total_ms)
    return taken


async def soak(options: argparse.Namespace, backend: str) -> list[float]:
    """The worker's memory over all requests, MiB."""
    with repository(options.model, [options.size]) as models:
        async with frontend(models, device=options.device) as (url, server), AsyncZImageClient(url) as client:
            worker = psutil.Process(server.queues[0].workers[0].pid)
            resident = await mixed(client, worker, backend)
    if worker.is_running():
        raise BenchmarkError("the worker outlived the server")
    return resident


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
    parser.add_argument("--size", default="128x128", help="of the equal images (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=12, help="of 50 images (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs and prints the figures."""
    backend = backend_of(options.model)
    resident = asyncio.run(soak(options, backend))
    latencies = asyncio.run(rows_of_equals(options, backend))
    growth = round(resident[-1] - resident[1], 1)
    print(f"memory after every {EVERY} requests, MiB: {resident}; it grew by {growth} since the second")
    later = {
        f"{name}_over_second": percentiles([times[index] / times[1] for times in latencies])
        for name, index in (("third", 2), ("fiftieth", 49))
    }
    later["p99_over_median"] = percentiles([np.percentile(times[1:], 99) / np.median(times[1:]) for times in latencies])
    print_table(("ratio", "p10", "p50", "p90"), [(name, p["p10"], p["p50"], p["p90"]) for name, p in later.items()])
    second = percentiles([times[1] for times in latencies])
    return {
        "settings": {
            "requests": REQUESTS,
            "rows": options.rows,
            "row": ROW,
            "engine": backend,
            "device": options.device,
            "size": options.size,
        },
        "resident_mib": resident,
        "rows": [row({"what": "soak"}, growth_mib=growth, second_ms=second, **later)],
    }
