"""How much memory does each engine take, stage by stage?

Method: for each row a process of its own draws one image, and records what is in use and its peak after every stage:
libraries imported, model and engines loaded, then encoding, denoising and decoding. `diffusers` is its pipeline,
`diffusers-compile` the same under torch.compile, which compiles meanwhile; an engine is loaded as in a worker, with the
eager modules whose weights it borrows, if any.

Units: MiB (2**20 bytes); host: resident size of the process; device: what torch has reserved there, plus what engines
hold outside it. A peak is the highest up to the end of that stage; the device's is the sum of both parts' own.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import choice
from benchmarks.choice import COMPILED, PIPELINES, Choice
from benchmarks.record import Row, print_table, row

STEPS = 8
COLUMNS = ("host_mib", "host_peak_mib", "device_mib", "device_peak_mib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    choice.add_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints the table. A row is an engine, a size and a stage."""
    chosen = choice.read(options)
    measured: list[Row] = []
    for backend in chosen.backends:
        for size in chosen.sizes:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                stages = process.submit(stages_of, chosen, backend, size).result()
            measured += [row({"engine": backend, "size": size, "stage": s}, **used) for s, used in stages.items()]
    print_table(
        ("engine", "size", "stage", *COLUMNS), [(*r["case"].values(), *(r[c] for c in COLUMNS)) for r in measured]
    )
    return {"settings": {**chosen.settings(), "steps": STEPS}, "rows": measured}


def stages_of(chosen: Choice, backend: str, size: str) -> dict[str, dict[str, float]]:
    """What is used after every stage of one image; to be called in a process of its own."""
    import diffusers.pipelines.z_image.pipeline_z_image  # noqa: F401 - what it imports is a stage of its own

    from benchmarks.diffusers_row import DiffusersRow, compiled
    from benchmarks.engine_row import EngineRow
    from benchmarks.subject import load_pipeline, open_served

    used = {"imported": _used()}
    drawer: DiffusersRow | EngineRow
    if backend in PIPELINES:
        pipeline = load_pipeline(chosen)
        pipeline = compiled(pipeline) if backend == COMPILED else pipeline
        drawer = DiffusersRow(pipeline, pipeline.device)
    else:
        drawer = EngineRow(open_served(chosen, backend), backend)
    used["loaded"] = _used()
    drawer.after = lambda component: used.update({component.value: _used()})
    drawer.draw(["a red circle on a white background"], size=size, steps=STEPS, seed=1)
    return used


def _used() -> dict[str, float]:
    from server.engines import memory

    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    host = {fields[0]: int(fields[1]) << 10 for fields in lines if fields[0] in ("VmRSS:", "VmHWM:")}
    sizes = (host["VmRSS:"], host["VmHWM:"], memory.device_bytes(), memory.device_peak_bytes())
    return {column: round(size / memory.MIB, 1) for column, size in zip(COLUMNS, sizes, strict=True)}
