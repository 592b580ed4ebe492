"""How long is it from starting the process to the first image?

Method: `zserve serve` over one exported model and one warmed size, started again and again; a client waits for the
first health answer, for SERVING (all engines loaded and warmed), and for its first image, which has to name the engine.
The files are in the operating system's cache after the first start, which does not count; building engines is not part.

Units: milliseconds since the process was started.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks import choice
from benchmarks.choice import Choice
from benchmarks.engines import checked_version
from benchmarks.record import Row, percentiles, print_table, row, shown
from benchmarks.serving import repository, served_rows, server_process
from benchmarks.traffic import check_answer
from client import ZImageClient
from export.manifest import Manifest

STEPS = 8
STAGES = ("health", "ready", "first image")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    choice.add_arguments(parser)
    parser.add_argument("-n", type=choice.positive, default=5, help="starts that count (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints the table. A row is an engine.

    Raises:
        BenchmarkError: none was chosen, or a model is not what the record would say.
    """
    chosen = choice.read(options)
    versions = {backend: checked_version(chosen, backend) for backend in served_rows(chosen.backends)}
    measured = [_measure(chosen, backend, *version, options.n) for backend, version in versions.items()]
    print_table(
        ("engine", *(f"{stage}, p50 ms" for stage in STAGES), "p90 of the last"),
        [
            (r["case"]["engine"], *(r["ms"][s]["p50"] for s in STAGES), *shown(r["ms"][STAGES[-1]], 90))
            for r in measured
        ],
    )
    return {"settings": {**chosen.settings(), "size": chosen.sizes[0], "warm_up": 1}, "rows": measured}


def _measure(chosen: Choice, backend: str, version: Path, manifest: Manifest, count: int) -> Row:
    with repository(version, chosen.sizes[:1], max_batch=chosen.max_batch) as models:
        starts = [_start(models, chosen.device, backend) for _ in range(1 + count)][1:]
    return row(
        {"engine": backend, "size": chosen.sizes[0]},
        precision=manifest.precision,
        ms={stage: percentiles([start[stage] for start in starts]) for stage in STAGES},
    )


def _start(models: Path, device: str, backend: str) -> dict[str, float]:
    with server_process(models, device) as server, ZImageClient(server.url) as client:
        began = time.perf_counter()
        drawing = client.draw("a red circle", seed=1, num_inference_steps=STEPS)
        first = 1e3 * (time.perf_counter() - began)
        check_answer(drawing.completed, choice.backend_of(backend), STEPS)
    return {"health": server.health_ms, "ready": server.ready_ms, "first image": server.ready_ms + first}
