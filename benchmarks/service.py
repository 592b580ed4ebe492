"""Is the compiled path through gRPC faster than diffusers, what does the server itself cost, and what does it carry?

Method: for each backend a server in a process of its own, with one worker. One at a time: for each of N different
prompts, the server and diffusers' eager pipeline (same checkpoint, in this process) draw the same seed, the one after
the other in alternating order, so that a drift of the machine's speed affects both; then N others as JPEG.
Closed loop: several clients, each of which asks again when it has its answer. Open loop: Poisson arrivals at a share of
the best closed-loop rate, independent of how the server fares, for a warm-up of twice the deadline and then for the
seconds that count; clients send the deadline with their call, and give up then. A failure other than overload ends the
run. Every image of the first part is compared with diffusers', every answer has to name the engine and 8 forwards.
Prompts are not repeated (under load only after all 1,500), so the server's prompt cache does not help. With --gpus K
the server has a worker on each of the first K. Python's garbage collection skips what this process has loaded, as in
the server's.

Units: milliseconds at the client, from the call to the last event; `overhead` is the call less what the three
components took, and `overhead_parts` where it went: outside the worker (client, frontend, both connections), waiting
for the device, encoding the image, and the rest of the worker. Requests a second; `device_share` is the throughput over
what the GPUs would do at the median time of the components in the JPEG requests, which come one right after the other
(over 1 where shared steps pay off); x is how many times as fast as diffusers, pair by pair.

In an open loop (`benchmarks.workload`): percentiles are of all requests, from the time planned for them; one that falls
among those without an answer is None, in the table "over" the deadline. `requests` says how many came, were answered,
and were answered in time; `rate` is the requests that came a second; `throughput` and `goodput` are the answers, and
those in time, given while requests came, over that time.
"""

import argparse
import asyncio
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import choice, rows
from benchmarks.choice import DIFFUSERS, Choice, backend_of
from benchmarks.diffusers_row import DiffusersRow
from benchmarks.engines import checked_version
from benchmarks.record import BenchmarkError, Row, determined, percentiles, print_table, ratios, row
from benchmarks.serving import repository, served_rows, server_process
from benchmarks.subject import load_pipeline
from benchmarks.traffic import Manners, Traffic, check_answer
from benchmarks.workload import METHOD, Mix, Size, above_zero, closed_summary, open_summary, poisson
from client import Drawing, ZImageClient
from export.manifest import Backend
from export.spec import Component, pixels
from server.heap import settle
from verify.distance import finite

STEPS = 8
WARM_UP = 2
UNDER_LOAD = 1500  # different prompts
PARTS = ("outside", "queue", "image_encode", "worker")
PATIENCE = 5.0  # deadline of the open loop, as a multiple of one request alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    choice.add_arguments(parser)
    parser.add_argument("-n", type=choice.positive, default=40, help="prompts one at a time (default: %(default)s)")
    parser.add_argument("--clients", type=choice.positive, action="append", help="may be repeated (default: 1 2 4 8)")
    parser.add_argument("--load", type=above_zero, action="append", help="may be repeated (default: 0.5 0.8 0.95 1.2)")
    parser.add_argument("--seconds", type=above_zero, default=10.0, help="of each load (default: %(default)s)")
    parser.add_argument("--gpus", type=choice.positive, default=1, help="that serve (default: the one of --device)")
    parser.add_argument("--deadline", type=above_zero, help="seconds (default: 5 times the median of one at a time)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints the tables. A row is a load and an engine.

    Raises:
        BenchmarkError: nothing would be measured, or a model is not what the record would say.
    """
    chosen = choice.read(options)
    _check_gpus(options.gpus, chosen.device)
    versions = {backend: checked_version(chosen, backend) for backend in _served(chosen, options)}
    pipeline = load_pipeline(chosen)
    diffusers = DiffusersRow(pipeline, pipeline.device)
    settle()
    measured: list[Row] = []
    for backend, (version, manifest) in versions.items():
        with (
            repository(version, chosen.sizes, gpus=options.gpus, max_batch=chosen.max_batch) as models,
            server_process(models, chosen.device) as server,
        ):
            service = Service(chosen, options, backend, manifest.precision, server.url)
            measured += service.one_at_a_time(diffusers)
            measured += asyncio.run(service.under_load(measured[-1]))
    _show(measured)
    sizes = {
        "size": chosen.sizes[0],
        "sizes_under_load": chosen.sizes,
        "seconds": options.seconds,
        "gpus": options.gpus,
    }
    return {"settings": {**chosen.settings(), **METHOD, **sizes, "steps": STEPS, "warm_up": WARM_UP}, "rows": measured}


def _check_gpus(gpus: int, device: str) -> None:
    """Raises `BenchmarkError` if there are fewer than `gpus`."""
    there = torch.cuda.device_count() if device.startswith("cuda") else 1
    if gpus > there:
        raise BenchmarkError(f"--gpus {gpus}: {there} can serve here")


def _served(chosen: Choice, options: argparse.Namespace) -> Sequence[str]:
    """The rows to serve; without a choice, the compiled engine that `zserve export` would make here."""
    if options.backend or options.model:
        return served_rows(b for b in chosen.backends if options.backend or b in chosen.models)
    return [Backend.AOTINDUCTOR if chosen.device.startswith("cuda") else Backend.ONNXRUNTIME]


@dataclass(frozen=True)
class Service:
    """Measures one server."""

    chosen: Choice
    options: argparse.Namespace
    backend: str
    precision: str  # of the version that is served
    url: str

    @property
    def _prompts(self) -> tuple[list[str], list[str], list[str]]:
        """The prompts for pairs, as JPEG, and under load."""
        count = WARM_UP + self.options.n
        prompts = rows.prompts(2 * count + UNDER_LOAD)
        return prompts[:count], prompts[count : 2 * count], prompts[2 * count :]

    def one_at_a_time(self, diffusers: DiffusersRow) -> list[Row]:
        """The row of diffusers, then the server's."""
        paired, others, _ = self._prompts
        with ZImageClient(self.url) as client:
            pairs = [self._pair(client, diffusers, prompt, number) for number, prompt in enumerate(paired)]
            jpegs = [self._call(client, prompt, 1000 + number, "jpeg") for number, prompt in enumerate(others)]
        kept = {name: [pair[name] for pair in pairs[WARM_UP:]] for name in pairs[0]}
        case: dict[str, str | int] = {"load": "one at a time", "clients": 1, "size": self.chosen.sizes[0]}
        in_process = {"precision": self.chosen.precision, "ms": percentiles(kept[DIFFUSERS])}
        return [
            row({**case, "engine": DIFFUSERS, "beside": self.backend}, **in_process, forwards=STEPS),
            row(
                {**case, "engine": self.backend},
                precision=self.precision,
                ms=percentiles(kept["server"]),
                overhead_ms=percentiles(kept["overhead"]),
                stages_ms={stage: percentiles(kept[stage]) for stage in ("encode", "denoise", "decode")},
                jpeg_ms=percentiles([ms for ms, _ in jpegs[WARM_UP:]]),
                overhead_parts_ms={part: percentiles(kept[part]) for part in PARTS},
                jpeg_overhead_ms=percentiles([_overhead(ms, drawing) for ms, drawing in jpegs[WARM_UP:]]),
                jpeg_overhead_parts_ms={
                    part: percentiles([_overhead_parts(ms, drawing)[part] for ms, drawing in jpegs[WARM_UP:]])
                    for part in PARTS
                },
                jpeg_device_ms=percentiles([ms - _overhead(ms, drawing) for ms, drawing in jpegs[WARM_UP:]]),
                speedup={DIFFUSERS: ratios(kept[DIFFUSERS], kept["server"])},
                psnr_db=finite(min(pair["psnr"] for pair in pairs)),
                largest_difference=int(max(pair["difference"] for pair in pairs)),
                forwards=STEPS,
            ),
        ]

    async def under_load(self, alone: Row) -> list[Row]:
        """Closed loops, then open ones at shares of the best rate; `alone` is the row of one request at a time."""
        *_, prompts = self._prompts
        traffic = Traffic(self.url, backend_of(self.backend), prompts, STEPS)
        sizes, seconds = [pixels(size) for size in self.chosen.sizes], self.options.seconds
        closed = []
        for clients in self.options.clients or (1, 2, 4, 8):
            outcomes = await traffic.closed_loop(clients, seconds, sizes)
            figures = _figures(closed_summary(outcomes, seconds))
            if len(sizes) == 1:
                busy = figures["throughput"] * alone["jpeg_device_ms"]["p50"] / 1e3
                figures["device_share"] = busy / self.options.gpus
            closed.append(row(self._case("closed", clients=clients), precision=self.precision, **figures))
        best = max(r["throughput"] for r in closed)
        deadline = self.options.deadline or PATIENCE * alone["ms"]["p50"] / 1e3
        return [*closed, *[await self._open(traffic, load, best, sizes, deadline) for load in self._loads()]]

    def _case(self, load: str, **point: float) -> dict[str, str | float]:
        return {"load": load, **point, "size": "+".join(self.chosen.sizes), "engine": self.backend}

    def _loads(self) -> Sequence[float]:
        return self.options.load or (0.5, 0.8, 0.95, 1.2)

    async def _open(self, traffic: Traffic, load: float, best: float, sizes: list[Size], deadline: float) -> Row:
        mix = Mix(dict.fromkeys(sizes, 1.0), unit=deadline, clients={"all": (1.0, 0, 1.0)})
        arrivals = poisson(load * best, self.options.seconds, mix, seed=11)
        outcomes = await traffic.open_loop(arrivals, Manners.TELL)
        figures = _figures(open_summary(outcomes, self.options.seconds))
        told = {"precision": self.precision, "deadline_ms": 1e3 * deadline}
        return row(self._case("open", share=load), **figures, **told)

    def _pair(self, client: ZImageClient, diffusers: DiffusersRow, prompt: str, number: int) -> dict[str, float]:
        """Both draw one prompt; which one goes first alternates."""
        if number % 2:
            expected, eager_ms = self._diffusers(diffusers, prompt, number)
            server_ms, drawing = self._call(client, prompt, number, "raw")
        else:
            server_ms, drawing = self._call(client, prompt, number, "raw")
            expected, eager_ms = self._diffusers(diffusers, prompt, number)
        got = np.asarray(drawing.images[0].pillow())
        timings = drawing.completed.timings
        close = rows.compare_images([got], expected, self.chosen.least_psnr(self.backend))
        return {
            "server": server_ms,
            DIFFUSERS: eager_ms,
            "overhead": _overhead(server_ms, drawing),
            **_overhead_parts(server_ms, drawing),
            "encode": timings.encode_ms,
            "denoise": timings.denoise_ms,
            "decode": timings.decode_ms,
            "difference": close["largest_difference"],
            "psnr": math.inf if close["psnr_db"] is None else close["psnr_db"],  # they are equal
        }

    def _diffusers(self, diffusers: DiffusersRow, prompt: str, seed: int) -> tuple[list[Any], float]:
        before, began = diffusers.calls[Component.DENOISER], time.perf_counter()
        images, _ = diffusers.draw([prompt], size=self.chosen.sizes[0], steps=STEPS, seed=seed)
        milliseconds = 1e3 * (time.perf_counter() - began)
        rows.check_count("the denoiser", diffusers.calls[Component.DENOISER] - before, STEPS)
        return images, milliseconds

    def _call(self, client: ZImageClient, prompt: str, seed: int, image_format: str) -> tuple[float, Drawing]:
        """Milliseconds of one call, and its answer, checked."""
        width, height = pixels(self.chosen.sizes[0])
        began = time.perf_counter()
        drawing = client.draw(
            prompt, seed=seed, width=width, height=height, num_inference_steps=STEPS, image_format=image_format
        )
        milliseconds = 1e3 * (time.perf_counter() - began)
        check_answer(drawing.completed, backend_of(self.backend), STEPS)
        return milliseconds, drawing


def _overhead(milliseconds: float, drawing: Drawing) -> float:
    """The part of a call that no component took."""
    t = drawing.completed.timings
    return milliseconds - t.encode_ms - t.denoise_ms - t.decode_ms


def _overhead_parts(milliseconds: float, drawing: Drawing) -> dict[str, float]:
    """Where the overhead of a call went, by `PARTS`."""
    t = drawing.completed.timings
    outside, known = milliseconds - t.total_ms, t.queue_ms + t.image_encode_ms
    parts = (outside, t.queue_ms, t.image_encode_ms, _overhead(milliseconds, drawing) - outside - known)
    return dict(zip(PARTS, parts, strict=True))


def _figures(outcome: dict[str, Any]) -> dict[str, Any]:
    """The figures without those by kind of client: there is only one kind here."""
    return {"ms": outcome["latency_ms"], **{k: v for k, v in outcome.items() if k not in ("latency_ms", "by_kind")}}


def _show(measured: list[Row]) -> None:
    header = (
        "load",
        "clients or share",
        "engine",
        "n",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "images/s",
        "goodput/s",
        "in time",
        "device share",
        "overhead",
        "x diffusers",
    )
    print_table(header, [line for r in measured for line in _lines(r)])


def _lines(r: Row) -> Iterator[list[object]]:
    case, requests = r["case"], r.get("requests")
    overhead, faster = r.get("overhead_ms"), r.get("speedup")
    yield [
        case["load"],
        case.get("clients", case.get("share")),
        case["engine"],
        *_percentiles(r["ms"], r),
        *(r.get(key) for key in ("throughput", "goodput")),
        f"{requests['good']} of {requests['offered']}" if isinstance(requests, dict) else None,
        r.get("device_share"),
        overhead and overhead["p50"],
        faster and faster[DIFFUSERS]["p50"],
    ]
    if "jpeg_ms" in r:
        nothing = [None] * 4
        alike = [f"{case['load']}, JPEG", case["clients"], case["engine"], *_percentiles(r["jpeg_ms"], r)]
        yield [*alike, *nothing, r["jpeg_overhead_ms"]["p50"], None]


def _percentiles(ms: Mapping[str, Any], r: Row) -> list[object]:
    return [ms["n"], *(_shown(ms[f"p{p}"], r) if determined(ms["n"], p) else None for p in (50, 90, 99))]


def _shown(milliseconds: float | None, r: Row) -> float | str:
    """A percentile; where it falls among requests without an answer, what is known of it."""
    return f"over {r['deadline_ms']:.0f}" if milliseconds is None else milliseconds
