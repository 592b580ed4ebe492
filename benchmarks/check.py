"""Are the compiled engines still as much faster than eager as a committed record says?

Method: the speed-ups in both records are ratios within one run, so the machine's speed of the day drops out. Every
speed-up of the committed record has to be there again, and to be no smaller than it by more than the tolerance. Another
kind of machine has other ratios: check where the committed record was made, or record anew.

Units: times as fast, p50; loss in %.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.record import BenchmarkError, Record, case_name, print_table, read, row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Both records, and what is tolerated."""
    parser.add_argument("measured", type=Path, help="the record of a run just made")
    parser.add_argument("committed", type=Path, help="the record to hold it against")
    parser.add_argument("--tolerance", type=float, default=10.0, help="%% of a speed-up (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the table.

    Raises:
        BenchmarkError: a speed-up was lost, or is not there any more.
    """
    measured, committed = read(options.measured), read(options.committed)
    rows = losses(measured, committed)
    print_table(("row", "committed", "measured", "loss %"), [_line(r) for r in rows])
    if measured["machine"] != committed["machine"]:
        print(f"the machines differ: {measured['machine']} and {committed['machine']}")
    lost = [r for r in rows if not r["loss_percent"] <= options.tolerance]  # written so that NaN fails
    if lost:
        raise BenchmarkError(f"lost over {options.tolerance:g} %: {'; '.join(case_name(r['case']) for r in lost)}")
    return {"rows": rows, "tolerance_percent": options.tolerance}


def losses(measured: Record, committed: Record) -> list[dict[str, Any]]:
    """How much of every committed speed-up is gone, in %.

    Raises:
        BenchmarkError: they are of different benchmarks, there is nothing to check, or some is missing.
    """
    if measured["benchmark"] != committed["benchmark"]:
        raise BenchmarkError(f"one is of {measured['benchmark']}, the other of {committed['benchmark']}")
    expected, found = speedups(committed), speedups(measured)
    if not expected:
        raise BenchmarkError(f"the committed record of {committed['benchmark']} has no speed-ups to check")
    gone = [name for name in expected if name not in found]
    if gone:
        raise BenchmarkError(f"not measured any more: {'; '.join(gone)}; run the benchmark as the committed one was")
    return [
        row({"speed-up": name}, committed=before, measured=found[name], loss_percent=100 * (1 - found[name] / before))
        for name, before in expected.items()
    ]


def speedups(record: Record) -> dict[str, float]:
    """The p50 of every compiled row's speed-ups, by row and what it is faster than."""
    return {
        f"{case_name(r['case'])}, over {other}": values["p50"]
        for r in record["rows"]
        if r["case"].get("engine") not in ("diffusers", "eager")
        for other, values in r.get("speedup", {}).items()
    }


def _line(r: dict[str, Any]) -> list[object]:
    return [r["case"]["speed-up"], r["committed"], r["measured"], r["loss_percent"]]
