"""What does the planner give to real clients? Open-loop Poisson load on two workers, against plain FIFO batching.

Method: a new server over one exported model, with two workers on the CPU, for each load, policy and round. At each load
the policies take turns, and the other one begins the next turn, so that a drift of the machine's speed affects both. In
a turn both get the same arrivals and prompts, in each round others: 10 % interactive (priority 1, in a hurry), 70 %
standard, 20 % batch (priority 7, no deadline); half 128x128, half 256x256, 8 steps; no prompt comes twice before all
1,500 have, so the prompt cache does not help. Clients with a deadline send it with the call. Load 1 is the rate at
which the planner served a closed loop of 16 clients at the beginning. Only requests after a warm-up of twice the
longest patience count. The FIFO server is the same one with `benchmarks.fifo` as its planner and every request of equal
priority and without a deadline: its clients wait, and an answer past their patience is not good. Every answer must name
the compiled engine.

Units: milliseconds, requests a second. `throughput` and `goodput` are the answers, and those before their client lost
patience, given while requests came, over that time; percentiles are of all requests, None where they fall among those
without an answer; `good` is the share of requests answered in time, whenever that was. `overload_goodput` is the
planner's goodput at 3 times the load over that at load 1, the median of the rounds. `cpu_ms`: processor time of the
workers, and of the frontend with the clients in its process, per good answer, warm-up and drain included: what overload
wastes, on a machine that does other things too.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import rows
from benchmarks.choice import positive, version_settings
from benchmarks.record import Row, print_table, row
from benchmarks.serving import add_model, frontend, only_backend, repository
from benchmarks.traffic import Manners, Traffic
from benchmarks.workload import CLIENTS, METHOD, Arrival, Mix, above_zero, closed_summary, open_summary, poisson
from server.frontend.app import Frontend
from server.frontend.workers import COMMAND

LOADS = (0.5, 1.0, 3.0)
SIZES = {(128, 128): 0.5, (256, 256): 0.5}
POLICIES = {"planner": COMMAND, "fifo": (sys.executable, "-P", "-m", "benchmarks.fifo")}
MANNERS = {"planner": Manners.TELL, "fifo": Manners.WAIT}
CLOSED_LOOP = 16  # clients
PROMPTS = 1500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    add_model(parser)
    parser.add_argument(
        "--seconds", type=above_zero, default=40.0, help="of arrivals at each load in each round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive, default=2, help="of all loads on both (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures both policies in turn and prints the table. A row is a policy, a load and a round."""
    model, seconds = options.model, options.seconds
    rate = asyncio.run(closed_rate(model, seconds / 2))
    measured: list[Row] = []
    for turn, (number, load) in enumerate(product(range(options.rounds), LOADS)):
        arrivals = poisson(load * rate, seconds, Mix(SIZES, unit=2 / rate), seed=11 + number)
        for policy in sorted(POLICIES, reverse=turn % 2 == 0):  # the other one first, from turn to turn
            case: dict[str, str | float] = {"policy": policy, "load": load, "round": number}
            measured.append(row(case, **asyncio.run(measure(model, policy, arrivals, seconds))))
    kinds = (f"good, {kind}" for kind in CLIENTS)
    print_table(("policy", "load", "round", "goodput/s", *kinds, "workers' CPU ms"), [_line(r) for r in measured])
    overload = _overload_goodput(measured)
    print(f"goodput at {LOADS[-1]:g}x over goodput at 1x, median of the rounds: {overload:.2f}")
    version = {"engine": only_backend(model), **version_settings(model, "cpu")}
    method = {**METHOD, "policies": "in turn", "rounds": options.rounds, "prompts": PROMPTS}
    settings = {**version, **method, "seconds": seconds, "closed_loop_rate": rate}
    return {"settings": settings, "overload_goodput": overload, "rows": measured}


def _overload_goodput(measured: Sequence[Row]) -> float:
    good = {tuple(r["case"].values()): r["goodput"] for r in measured}
    rounds = {r["case"]["round"] for r in measured}
    return float(median(good["planner", LOADS[-1], number] / good["planner", 1.0, number] for number in rounds))


def _line(r: Row) -> list[object]:
    kinds = r["by_kind"]
    good = (kinds[kind]["good"] if kind in kinds else None for kind in CLIENTS)
    return [*r["case"].values(), r["goodput"], *good, r["cpu_ms"]["workers"]]


@asynccontextmanager
async def serving(engines: Path, policy: str) -> AsyncIterator[tuple[Frontend, Traffic]]:
    """A new server with one policy, ready, and its clients."""
    with repository(engines, ["256x256", "128x128"], workers=2) as models:
        async with frontend(models, POLICIES[policy]) as (url, server):
            yield server, Traffic(url, only_backend(engines), rows.prompts(PROMPTS))


async def closed_rate(engines: Path, seconds: float) -> float:
    """Requests a second that the planner serves a closed loop: load 1."""
    async with serving(engines, "planner") as (_, traffic):
        outcomes = await traffic.closed_loop(CLOSED_LOOP, seconds, list(SIZES))
    return float(closed_summary(outcomes, seconds)["throughput"])


async def measure(engines: Path, policy: str, arrivals: Sequence[Arrival], seconds: float) -> dict[str, Any]:
    """The figures of one policy, whose window is `seconds` long."""
    async with serving(engines, policy) as (server, traffic):
        before = cpu_seconds(server)
        outcomes = await traffic.open_loop(arrivals, MANNERS[policy])
        good = max(1, sum(o.good for o in outcomes))
        spent = {who: 1e3 * (s - before[who]) / good for who, s in cpu_seconds(server).items()}
    return {**open_summary(outcomes, seconds), "cpu_ms": spent}


def cpu_seconds(server: Frontend) -> dict[str, float]:
    """Processor time so far: of the workers, and of this process."""
    times = [psutil.Process(worker.pid).cpu_times() for worker in server.queues[0].workers]
    return {"workers": sum(t.user + t.system for t in times), "frontend_and_clients": time.process_time()}
