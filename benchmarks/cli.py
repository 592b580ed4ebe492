"""`zserve bench NAME`: one question per benchmark. `zserve bench NAME --help` states it and how it is answered.

A table for people comes first; the last line is the whole record as one JSON object, printed before it is written or
drawn anywhere. In the table a percentile is left out (-) where there are too few values for it, under 100 for p99 and
under 10 for p90; the record has all of them.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from benchmarks.plots import PLOTS, check_plot, draw
from benchmarks.record import BenchmarkError, Neighbours, Record, check_writable, provenance, write
from client import GenerationFailedError
from export.errors import ExportError
from server.errors import ZServeError

# Each is a module of the same name with `add_arguments(parser)` and `run(options)`, which prints its table and returns
# the record's own part; its docstring is its --help. Imported only when asked for.
BENCHMARKS = {
    "components": "each component on each engine, by size and batch",
    "image": "a whole image in one process, by stage",
    "service": "through gRPC: one at a time against diffusers, closed loop, open loop",
    "quality": "whether compiling changes the picture, by engine and precision",
    "demo_quality": "whether the demo model draws what it is asked for, by size and language",
    "startup": "from starting the process to the first image",
    "memory": "host and device memory, stage by stage",
    "packages": "AOTInductor packages against fp32, the time to open them, and what memory that takes",
    "scheduling": "the planner against first in, first out, under load",
    "simulation": "the same policy on up to 8 simulated GPUs",
    "planner": "what one decision of the planner costs",
    "soak": "whether a worker stays as it is over hundreds of requests",
    "preview": "what a preview costs beside a step",
    "protocol": "perf_analyzer against this server and NVIDIA's",
    "image_transfer": "what an image costs from the worker to the client, by format",
    "full_size_export": "time and memory that exporting the published model takes",
    "compare": "two records, row by row",
    "check": "whether engines are still as much faster as a committed record says",
}


def main(argv: Sequence[str]) -> int:
    """Runs one benchmark; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, BENCHMARKS))
        print(__doc__, *(f"    {name:<{width}}  {text}" for name, text in BENCHMARKS.items()), sep="\n")
        return 0
    name, *arguments = argv
    if name not in BENCHMARKS:
        print(f"zserve bench: no benchmark {name!r}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    return _run(name, importlib.import_module(f"benchmarks.{name}"), arguments)


def _run(name: str, module: ModuleType, arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"zserve bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--output", type=Path, help="write the record here too")
    if name in PLOTS:
        parser.add_argument("--plot", type=Path, help="draw it into this .svg or .png")
    else:
        parser.set_defaults(plot=None)
    options = parser.parse_args(arguments)
    try:
        _check(name, options)
        record = _measure(name, module, options)
    except (BenchmarkError, ExportError, ZServeError, GenerationFailedError) as error:
        print(f"zserve bench {name}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(record, ensure_ascii=False), flush=True)
    if options.output:
        write(options.output, record)
    if options.plot:
        draw(record, options.plot)
    return 1 if record.get("failed") else 0


def _check(name: str, options: argparse.Namespace) -> None:
    """Checks early what would otherwise fail late or without a clear message: files, and the device if there is one.

    Raises:
        BenchmarkError, UnsupportedError: see `check_writable`, `check_plot` and `checked_device`.
    """
    if options.output:
        check_writable("--output", options.output)
    if options.plot:
        check_plot(options.plot)
        check_writable("--plot", options.plot)
    if "device" in options:
        from export.devices import checked_device

        checked_device(options.device)


def _measure(name: str, module: ModuleType, options: argparse.Namespace) -> Record:
    origin, neighbours = provenance(), Neighbours()
    measured = module.run(options)
    return {"benchmark": name, **origin, **neighbours.record(), **measured}
