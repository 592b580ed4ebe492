"""What a benchmark leaves behind: rows of figures, and where they came from.

A record is one JSON object: `benchmark`, machine, versions, commit, date, the machine's load averages over 1, 5 and 15
minutes before and after, the share of its CPU time that its host gave to other machines meanwhile (`cpu_stolen`; 0
where the host does not say), the benchmark's own `settings`, and `rows`.
A row's `case` says what was measured; percentiles and numbers beside it are figures, texts are facts about them.
"""

import datetime
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from export.validity import installed_version
from verify.machine import commit, cpu_name, cpu_quota

Row = dict[str, Any]
Record = dict[str, Any]

LIBRARIES = (
    *("torch", "triton", "fa3_fwd", "diffusers", "transformers"),
    *("onnxruntime", "tensorrt", "tensorrt_rtx", "grpcio", "zserve"),
)
PERCENTS = (10, 50, 90, 95, 99)


class BenchmarkError(Exception):
    """What was asked for cannot be measured, or what ran is not what was to be measured; the message says which."""


def machine() -> dict[str, Any]:
    """CPU, cores and GPU of this machine; `cpu_quota` where a container may take less time than its cores have."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        **cpu_quota(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def provenance() -> dict[str, Any]:
    """Machine, versions of the libraries, CUDA and driver, commit ("+": files were changed since) and date."""
    import torch

    return {
        "machine": machine(),
        "versions": {name: installed_version(name) for name in LIBRARIES}
        | {"cuda": torch.version.cuda, "driver": _driver()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class Neighbours:
    """How busy the machine and its host are from here on."""

    def __init__(self) -> None:
        self._load, self._times = os.getloadavg(), psutil.cpu_times()

    def record(self) -> dict[str, Any]:
        """`load_average` and `cpu_stolen` of a record, until now."""
        taken = {name: now - getattr(self._times, name) for name, now in psutil.cpu_times()._asdict().items()}
        whole = sum(seconds for name, seconds in taken.items() if not name.startswith("guest"))  # which are user's too
        return {
            "load_average": {"before": self._load, "after": os.getloadavg()},
            "cpu_stolen": round(taken.get("steal", 0.0) / max(whole, 0.01), 4),
        }


def _driver() -> str | None:
    """The version of NVIDIA's driver, if there is one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p10, p50, p90, p95, p99 (by linear interpolation) and n, the count of `values`.

    Raises:
        BenchmarkError: there are none.
    """
    if not values:
        raise BenchmarkError("nothing was measured, so there are no percentiles")
    cuts = np.percentile(values, PERCENTS)
    return {f"p{percent}": round(float(cut), 4) for percent, cut in zip(PERCENTS, cuts, strict=True)} | {
        "n": len(values)
    }


def determined(count: int, percent: int) -> bool:
    """Whether one of `count` values lies beyond a percentile; otherwise it says more of the largest value than of most.

    p99 needs 100 values, p95 20, p90 and p10 10. The median is that of however few there are.
    """
    return percent == 50 or count * min(percent, 100 - percent) >= 100


def shown(values: Mapping[str, Any], *percents: int) -> list[float | None]:
    """`percents` of what `percentiles` made, for a table: None where there are too few values for one."""
    return [values[f"p{percent}"] if determined(values["n"], percent) else None for percent in percents]


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Percentiles of how many times as fast `fast` was, repetition by repetition of the same run."""
    return percentiles([a / b for a, b in zip(slow, fast, strict=True)])


def row(case: Mapping[str, str | int | float], **columns: Any) -> Row:
    """One row: what was measured, and its figures and facts."""
    return {"case": dict(case), **columns}


def case_name(case: Mapping[str, Any]) -> str:
    """A case in one line, the same for equal cases."""
    return ", ".join(f"{key} {value}" for key, value in case.items())


def figures(measured: Row) -> dict[str, float]:
    """The figures of a row by dotted name: numbers, and the p50 of percentiles."""
    return dict(_figures("", {key: value for key, value in measured.items() if key != "case"}))


def _figures(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        inner = {"": value["p50"]} if "p50" in value else value
        for key, part in inner.items():
            yield from _figures(".".join(filter(None, (name, key))), part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def difference(a: Any, b: Any, *, but: Sequence[str] = ()) -> str:
    """What differs between the same part of two records, in words, keys in `but` left out; empty if nothing does."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        differ = [key for key in {**a, **b} if key not in but and a.get(key) != b.get(key)]
        return ", ".join(f"{key}: {a.get(key)} and {b.get(key)}" for key in differ)
    return "" if a == b else f"{a} and {b}"


def check_writable(option: str, path: Path) -> None:
    """Called before anything is measured; makes the folder.

    Raises:
        BenchmarkError: `path`, which `option` gives, cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise BenchmarkError(
            f"{option} {path} cannot be written ({error.strerror}); give a file that can be"
        ) from error


def write(path: Path, record: Record) -> None:
    """Writes a record for `read`, and for people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read(path: Path) -> Record:
    """A record with rows, each with the `case` that was measured.

    Raises:
        BenchmarkError: there is no such file, or it is not such a record.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} cannot be read ({error}); give a file that --output wrote") from error
    if not (isinstance(record, dict) and record.get("benchmark") and _are_rows(record.get("rows"))):
        raise BenchmarkError(
            f"{path} is no record with rows, each with its case; give a file that `zserve bench NAME --output` wrote"
        )
    for name, times in Counter(case_name(r["case"]) for r in record["rows"]).items():
        if times > 1:
            raise BenchmarkError(f"{path} has {times} rows of one case ({name}), so it is not known which is meant")
    return record


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(r, dict) and isinstance(r.get("case"), dict) for r in value)


def print_table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Prints columns as wide as needed, numbers to the right."""
    cells = [list(header), *([_cell(value) for value in line] for line in lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for number, texts in enumerate(cells):
        print("  ".join(_aligned(text, width) for text, width in zip(texts, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _aligned(text: str, width: int) -> str:
    return text.rjust(width) if text[:1].isdigit() or text in "-" else text.ljust(width)
