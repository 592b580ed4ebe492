"""What does the planner give to real clients? Open-loop Poisson load on two workers, against plain FIFO batching.

Method: for each policy one server over the demo model with two workers on the CPU, and for each load the same arrivals:
10 % interactive (priority 1, in a hurry), 70 % standard, 20 % batch (priority 7, no deadline); half 128x128, half
256x256, 8 steps. Clients with a deadline send it with the call. Load 1 is the rate at which a closed loop of 16 clients
was served just before, by the same server. Only requests after a warm-up of twice the longest patience count. The FIFO
server is the same one with `benchmarks.fifo` as its planner and every request of equal priority and without a deadline:
its clients wait, and an answer past their patience is not good. Every answer must name the compiled engine.

Units: milliseconds, requests a second. `throughput` and `goodput` are the answers, and those before their client lost
patience, given while requests came, over that time; percentiles are of all requests, None where they fall among those
without an answer; `good` is the share of requests answered in time, whenever that was. `cpu_ms`: processor time of the
workers, and of the frontend with the clients in its process, per good answer, warm-up and drain included: what overload
wastes, on a machine that does other things too.
"""

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.choice import version_settings
from benchmarks.record import Row, print_table, row
from benchmarks.serving import add_model, frontend, only_backend, repository
from benchmarks.traffic import Manners, Traffic
from benchmarks.workload import CLIENTS, METHOD, Mix, above_zero, closed_summary, open_summary, poisson
from server.frontend.app import Frontend
from server.frontend.workers import COMMAND

LOADS = (0.5, 1.0, 3.0)
SIZES = {(128, 128): 0.5, (256, 256): 0.5}
POLICIES = {"planner": COMMAND, "fifo": (sys.executable, "-P", "-m", "benchmarks.fifo")}
MANNERS = {"planner": Manners.TELL, "fifo": Manners.WAIT}
CLOSED_LOOP = 16  # clients


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    add_model(parser)
    parser.add_argument(
        "--seconds", type=above_zero, default=40.0, help="of arrivals at each load (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures both policies and prints the table."""
    rate, planned = asyncio.run(measure(options.model, "planner", options.seconds, None))
    _, in_order = asyncio.run(measure(options.model, "fifo", options.seconds, rate))
    rows = [*planned, *in_order]
    kinds = (f"good, {kind}" for kind in CLIENTS)
    print_table(("policy", "load", "goodput/s", *kinds, "workers' CPU ms"), [_line(r) for r in rows])
    overload = planned[-1]["goodput"] / planned[1]["goodput"]
    print(f"goodput at {LOADS[-1]:g}x over goodput at 1x: {overload:.2f}")
    version = {"engine": only_backend(options.model), **version_settings(options.model, "cpu")}
    settings = {**version, **METHOD, "seconds": options.seconds, "closed_loop_rate": rate}
    return {"settings": settings, "overload_goodput": overload, "rows": rows}


def _line(r: Row) -> list[object]:
    kinds = r["by_kind"]
    good = (kinds[kind]["good"] if kind in kinds else None for kind in CLIENTS)
    return [*r["case"].values(), r["goodput"], *good, r["cpu_ms"]["workers"]]


async def measure(engines: Path, policy: str, seconds: float, rate: float | None) -> tuple[float, list[Row]]:
    """The rate of load 1, measured if `rate` is None, and the rows of all loads on one policy."""
    points = []
    with repository(engines, ["256x256", "128x128"], workers=2) as models:
        async with frontend(models, POLICIES[policy]) as (url, server):
            traffic = Traffic(url, only_backend(engines), ["a red circle"])
            if rate is None:
                closed = await traffic.closed_loop(CLOSED_LOOP, seconds / 2, list(SIZES))
                rate = closed_summary(closed, seconds / 2)["throughput"]
            for load in LOADS:
                arrivals = poisson(load * rate, seconds, Mix(SIZES, unit=2 / rate), seed=11)
                before = cpu_seconds(server)
                outcomes = await traffic.open_loop(arrivals, MANNERS[policy])
                good = max(1, sum(o.good for o in outcomes))
                spent = {who: 1e3 * (s - before[who]) / good for who, s in cpu_seconds(server).items()}
                case: dict[str, str | float] = {"policy": policy, "load": load}
                points.append(row(case, **open_summary(outcomes, seconds), cpu_ms=spent))
    return rate, points


def cpu_seconds(server: Frontend) -> dict[str, float]:
    """Processor time so far: of the workers, and of this process."""
    times = [psutil.Process(worker.pid).cpu_times() for worker in server.queues[0].workers]
    return {"workers": sum(t.user + t.system for t in times), "frontend_and_clients": time.process_time()}
