"""Are the other rows still as much faster than diffusers and eager as a committed record says?

Method: the speed-ups in a record are ratios within one run, so most of the machine's speed of the day cancels out.
Every speed-up of the committed record has to be measured again. It is lost if nine of ten repetitions are below the
committed p50 by more than the tolerance: where repetitions scatter, so do the medians of two runs. Of several runs the
best counts, speed-up by speed-up: a real loss shows in all of them, and among dozens one or another is off by chance.
All must have the same settings, except for how often and how long. Ratios differ on another kind of machine, and on one
whose cores are busy: a warning says if diffusers or eager itself took over 30 % more or less time in the last run than
in the committed record. Check where the committed record was made, or record anew.

Units: times as fast, p50, and p90 of what was measured; losses from the committed p50 in %; `moved` is milliseconds
divided by those of the committed record.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.record import BenchmarkError, Record, Row, case_name, difference, figures, print_table, read, row

BASELINES = ("diffusers", "eager")  # what the others are faster than
MOVED = 0.3  # of a baseline's own p50
HOW_OFTEN = ("warm_up", "repetitions", "seconds")  # settings that need not be equal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The records and the tolerance."""
    parser.add_argument("measured", type=Path, nargs="+", help="records of runs just made; of several the best counts")
    parser.add_argument("committed", type=Path, help="the record to hold them against")
    parser.add_argument(
        "--tolerance", type=_percent, default=10.0, help="%% of a speed-up, 0 to 100 (default: %(default)s)"
    )


def _percent(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not a percentage from 0 to 100")
    return value


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the table; `failed` names the speed-ups that were lost.

    Raises:
        BenchmarkError: see `losses`.
    """
    runs, committed = [read(path) for path in options.measured], read(options.committed)
    rows = [min(same, key=_least) for same in zip(*(losses(run, committed) for run in runs), strict=True)]
    print_table(("row", "committed", "measured", "loss %", "p90", "loss %"), [_line(r) for r in rows])
    for part in ("machine", "versions"):
        if differ := difference(runs[-1].get(part), committed.get(part)):
            print(f"{part} differ: {differ}")
    if moved := baselines_moved(runs[-1], committed):
        told = "; ".join(f"{name}: {ratio:.2f} times" for name, ratio in moved.items())
        print(
            f"warning: the machine or its load is not what it was, and speed-ups depend on both; p50 over then: {told}"
        )
    lost = [r["case"]["speed-up"] for r in rows if not _least(r) <= options.tolerance]  # so that NaN fails
    if lost:
        print(f"lost over {options.tolerance:g} %: {'; '.join(lost)}")
    return {"rows": rows, "tolerance_percent": options.tolerance, "moved": moved, "failed": lost}


def losses(measured: Record, committed: Record) -> list[dict[str, Any]]:
    """How much of every committed speed-up is gone, in %.

    Raises:
        BenchmarkError: they are of different benchmarks or settings, there is nothing to check, or one is missing.
    """
    if measured["benchmark"] != committed["benchmark"]:
        raise BenchmarkError(f"one is of {measured['benchmark']}, the other of {committed['benchmark']}")
    if differ := difference(measured.get("settings"), committed.get("settings"), but=HOW_OFTEN):
        raise BenchmarkError(f"the settings differ: {differ}; run the benchmark as the committed one was")
    expected, found = speedups(committed), speedups(measured)
    if not expected:
        raise BenchmarkError(f"the committed record of {committed['benchmark']} has no speed-ups to check")
    gone = [name for name in expected if name not in found]
    if gone:
        raise BenchmarkError(f"not measured any more: {'; '.join(gone)}; run the benchmark as the committed one was")
    return [
        row(
            {"speed-up": name},
            committed=before["p50"],
            measured=found[name]["p50"],
            loss_percent=100 * (1 - found[name]["p50"] / before["p50"]),
            measured_p90=found[name]["p90"],
            least_loss_percent=100 * (1 - found[name]["p90"] / before["p50"]),
        )
        for name, before in expected.items()
    ]


def speedups(record: Record) -> dict[str, dict[str, float]]:
    """p50 and p90 of the speed-ups of every row but diffusers' and eager's, by row and what it is faster than.

    Raises:
        BenchmarkError: one is not a positive number.
    """
    return {
        f"{case_name(r['case'])}, over {other}": cuts
        for r in record["rows"]
        if r["case"].get("engine") not in BASELINES
        for other, cuts in _speedups(r).items()
    }


def _speedups(r: Row) -> dict[str, dict[str, float]]:
    told = r.get("speedup", {})
    cuts = told if isinstance(told, dict) else {"": None}
    found = {other: {name: _cut(cut, name) for name in ("p50", "p90")} for other, cut in cuts.items()}
    if not all(ratio > 0 for each in found.values() for ratio in each.values()):
        raise BenchmarkError(f"{case_name(r['case'])}: its speed-ups are {told}; numbers over 0 are accepted")
    return found


def _cut(percentiles: Any, name: str) -> float:
    """A percentile, or the median if there is no other; NaN if that is not a number."""
    found = percentiles.get(name, percentiles.get("p50")) if isinstance(percentiles, dict) else percentiles
    return float(found) if isinstance(found, int | float) else math.nan


def baselines_moved(measured: Record, committed: Record) -> dict[str, float]:
    """By row, the p50 of diffusers and eager over the committed one, if they differ by over 30 %."""
    before, now = _baselines(committed), _baselines(measured)
    ratios = {name: now[name] / ms for name, ms in before.items() if name in now}
    return {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > MOVED}


def _baselines(record: Record) -> dict[str, float]:
    rows = [r for r in record["rows"] if r["case"].get("engine") in BASELINES]
    taken = {case_name(r["case"]): figures(r).get("ms", 0.0) for r in rows}
    return {name: ms for name, ms in taken.items() if ms > 0}


def _least(r: dict[str, Any]) -> float:
    return float(r["least_loss_percent"])


def _line(r: dict[str, Any]) -> list[object]:
    return [r["case"]["speed-up"], *(value for name, value in r.items() if name != "case")]
