"""How do two records of one benchmark differ, row by row?

Method: rows with the same case are set side by side; the p50 stands for percentiles. A figure that only one of them
has, such as a median latency where most requests were answered, is shown beside "-"; rows that only one record has are
listed below. Records of different benchmarks are refused; of different machines or settings they are compared, and that
is said.

Units: those of the records; ratio is B over A, so for milliseconds under 1 is faster.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.record import BenchmarkError, Record, case_name, difference, figures, print_table, read, row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Both records."""
    parser.add_argument("a", type=Path, help="the record to compare with")
    parser.add_argument("b", type=Path, help="the record that is compared")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the table; a row of the record has the ratios of one row."""
    a, b = read(options.a), read(options.b)
    rows = compare(a, b)
    for key in ("machine", "versions", "settings"):
        if differ := difference(a.get(key), b.get(key)):
            print(f"{key} differ: {differ}")
    lines = [(case_name(r["case"]), name, *values) for r in rows for name, values in r["figures"].items()]
    print_table(("row", "figure", "A", "B", "B / A"), lines)
    alone = {"A": only(a, b), "B": only(b, a)}
    for name, cases in alone.items():
        for case in cases:
            print(f"only in {name}: {case}")
    return {"compared": [str(options.a), str(options.b)], "rows": rows, "only_in": alone}


def compare(a: Record, b: Record) -> list[dict[str, Any]]:
    """The figures (a, b, ratio) of every case that both have; None for what one of them has not.

    Raises:
        BenchmarkError: they are of different benchmarks, or have no case in common.
    """
    if a["benchmark"] != b["benchmark"]:
        raise BenchmarkError(
            f"A is of {a['benchmark']} and B of {b['benchmark']}; records of one benchmark are compared"
        )
    theirs = {case_name(r["case"]): figures(r) for r in b["rows"]}
    rows = []
    for mine in a["rows"]:
        found = theirs.get(case_name(mine["case"]))
        if found is not None:
            had = figures(mine)
            rows.append(row(mine["case"], figures={n: _pair(had.get(n), found.get(n)) for n in {**had, **found}}))
    if not rows:
        raise BenchmarkError("the records have no row in common; compare runs with the same sizes, batches and engines")
    return rows


def _pair(a: float | None, b: float | None) -> list[float | None]:
    """Both, and their ratio where there is one."""
    return [a, b, b / a if a and b is not None else None]


def only(a: Record, b: Record) -> list[str]:
    """The cases that `a` has and `b` lacks."""
    theirs = {case_name(r["case"]) for r in b["rows"]}
    return [name for r in a["rows"] if (name := case_name(r["case"])) not in theirs]
