"""Does a worker stay as it is? Memory over 500 requests of mixed sizes, and the 50th image in a row against the 2nd.

Method: one server over the demo model with one worker on the CPU. 500 requests, four at a time, of six sizes, 1 to 4
steps, some with guidance or two images, some of them left in the middle; the worker's resident memory after every 50.
In the end the worker has to be gone with the server. Then, on a new worker each time, 50 equal images at 128x128, 8
steps, one after the other: of each row the 50th image's latency over the 2nd's, and as a measure of what is noise the
3rd's over the 2nd's.

Units: MiB, milliseconds, ratios. `growth` is from the 100th to the last request: before that, every size has its first
use. The 50th is as fast as the 2nd where both ratios have the same median and spread.
"""

import argparse
import asyncio
import random
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import BenchmarkError, percentiles, print_table, row
from benchmarks.serving import add_model, frontend, repository
from benchmarks.traffic import check_engines
from client import AsyncZImageClient
from client.messages import ImageRequest
from export.manifest import Backend

SIZES = ((64, 64), (96, 64), (128, 128), (64, 160), (192, 128), (256, 256))
REQUESTS, EVERY, ROW = 500, 50, 50
WARMED = ["256x256", "128x128"]


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


async def send(client: AsyncZImageClient, request: ImageRequest, number: int) -> None:
    """One request; every ninth client leaves in the middle."""
    async for event in client.generate(request):
        if number % 9 == 0 and event.HasField("progress"):
            return
        if event.HasField("completed"):
            check_engines(event.completed, Backend.ONNXRUNTIME)


async def mixed(client: AsyncZImageClient, worker: psutil.Process) -> list[float]:
    """Resident MiB after every `EVERY` requests."""
    work, resident = requests(3), []
    for first in range(0, REQUESTS, 4):
        await asyncio.gather(*(send(client, r, first + n) for n, r in enumerate(work[first : first + 4])))
        if (first + 4) % EVERY < 4:
            resident.append(round(worker.memory_info().rss / 2**20, 1))
    return resident


async def row_of_equals(client: AsyncZImageClient) -> list[float]:
    """Milliseconds of each of `ROW` equal images."""
    drawn = [await client.draw("a blue star", width=128, height=128, seed=number) for number in range(ROW)]
    return [drawing.completed.timings.total_ms for drawing in drawn]


async def soak(engines: Path) -> list[float]:
    """The worker's memory over all requests, MiB."""
    with repository(engines, WARMED) as models:
        async with frontend(models) as (url, server), AsyncZImageClient(url) as client:
            worker = psutil.Process(server.queues[0].workers[0].pid)
            resident = await mixed(client, worker)
    if worker.is_running():
        raise BenchmarkError("the worker outlived the server")
    return resident


async def rows_of_equals(engines: Path, count: int) -> list[list[float]]:
    """Latencies of `count` rows, ms, each on a worker that has only been warmed up."""
    found = []
    with repository(engines, WARMED) as models:
        for _ in range(count):
            async with frontend(models) as (url, _), AsyncZImageClient(url) as client:
                found.append(await row_of_equals(client))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    add_model(parser)
    parser.add_argument("--rows", type=int, default=12, help="of 50 images (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs and prints the figures."""
    resident = asyncio.run(soak(options.model))
    latencies = asyncio.run(rows_of_equals(options.model, options.rows))
    growth = round(resident[-1] - resident[1], 1)
    print(f"memory after every {EVERY} requests, MiB: {resident}; it grew by {growth} since the second")
    later = {
        f"{name}_over_second": percentiles([times[index] / times[1] for times in latencies])
        for name, index in (("third", 2), ("fiftieth", 49))
    }
    print_table(("ratio", "p10", "p50", "p90"), [(name, p["p10"], p["p50"], p["p90"]) for name, p in later.items()])
    second = percentiles([times[1] for times in latencies])
    return {
        "settings": {"requests": REQUESTS, "rows": options.rows, "row": ROW},
        "resident_mib": resident,
        "rows": [row({"what": "soak"}, growth_mib=growth, second_ms=second, **later)],
    }
