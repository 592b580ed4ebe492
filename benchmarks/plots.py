"""Draws the records that have a picture: stages by engine, latency over throughput, scaling with size and batch."""

from collections.abc import Callable, Iterator
from itertools import groupby
from math import nan, prod
from pathlib import Path
from typing import Any

from benchmarks.record import BenchmarkError, Record, Row

Foreign = Any  # matplotlib's, whose stubs are not installed
SUFFIXES = (".svg", ".png")


def check_plot(path: Path) -> None:
    """Called before anything is measured.

    Raises:
        BenchmarkError: there is no such format, or no library to draw with.
    """
    if path.suffix not in SUFFIXES:
        raise BenchmarkError(f"--plot {path}: {' and '.join(SUFFIXES)} are accepted")
    _pyplot()


def draw(record: Record, path: Path) -> None:
    """Draws `record` into `path`."""
    figure = PLOTS[record["benchmark"]](record["rows"])
    figure.suptitle(f"{_where(record)}, {record['date'][:10]}, {_commit(record)}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    _pyplot().close(figure)


def _commit(record: Record) -> str:
    """Short; with a + where the code had changes that are in no commit."""
    commit = record["commit"]
    return "no commit" if commit is None else commit[:8] + "+" * commit.endswith("+")


def _where(record: Record) -> str:
    """The device that computed: a machine with a GPU may have been measured without it."""
    if record["benchmark"] == "simulation":
        return "simulated"
    machine = record["machine"]
    if machine["gpu"] and not record["settings"].get("device", "cuda").startswith("cpu"):
        return str(machine["gpu"])
    return f"{machine['cores']} cores of {machine['cpu']}"


def _pyplot() -> Foreign:
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise BenchmarkError("--plot needs matplotlib: pip install 'zserve[bench]'") from error
    mpl.use("Agg")
    mpl.rcParams["figure.constrained_layout.use"] = True
    mpl.rcParams["svg.hashsalt"] = "zserve"  # the same record gives the same file
    from matplotlib import pyplot

    return pyplot


def _by(rows: list[Row], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row["case"].get(k) for k in keys)

    order = {k: number for number, k in enumerate(dict.fromkeys(map(key, rows)))}
    for name, group in groupby(sorted(rows, key=lambda row: order[key(row)]), key):
        yield name, list(group)


def _stages(rows: list[Row]) -> Foreign:
    """A bar per engine, a panel per size and batch; the stages' medians need not add up to the whole's."""
    groups = list(_by(rows, "size", "batch"))
    figure, panels = _pyplot().subplots(1, len(groups), figsize=(4.5 * len(groups) + 1, 3.2), squeeze=False)
    for ((size, batch), group), panel in zip(groups, panels[0], strict=True):
        engines, ends = [r["case"]["engine"] for r in group], [0.0] * len(group)
        for stage in group[0]["stages_ms"]:
            widths = [r["stages_ms"][stage]["p50"] for r in group]
            panel.barh(engines, widths, left=ends, label=stage)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        for place, r in enumerate(group):
            panel.text(ends[place], place, f" {r['ms']['p50']:.0f}", va="center", fontsize=8)
        panel.set(title=f"{size}, batch {batch}", xlabel="ms, p50", xlim=(0, 1.15 * max(ends)))
        panel.invert_yaxis()
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside lower center")
    return figure


def _service(rows: list[Row]) -> Foreign:
    """Latency over throughput: closed loops by their clients, open ones by their share of the best closed rate.

    A percentile that falls among requests without an answer is not drawn.
    """
    figure, panel = _pyplot().subplots(figsize=(6, 4))
    loaded = [r for r in rows if "throughput" in r and r["ms"]]
    for number, ((engine, size, load), group) in enumerate(_by(loaded, "engine", "size", "load")):
        rates, points = [r["throughput"] for r in group], "clients" if load == "closed" else "share"
        what = f"{engine}, {size}" if size else engine  # older records have one size, and do not say it here
        for percent, style in (("p50", "o-"), ("p95", "o:")):
            name, values = f"{what}, {load} loop by {points}, {percent}", [_drawn(r["ms"][percent]) for r in group]
            panel.plot(rates, values, style, color=f"C{number}", markersize=4, label=name + _of_whom(group[0]))
        for r, rate in zip(group, rates, strict=True):
            place = {"xytext": (3, 3), "textcoords": "offset points", "color": f"C{number}", "fontsize": 7}
            if r["ms"]["p50"] is not None:
                panel.annotate(r["case"][points], (rate, r["ms"]["p50"]), **place)
    panel.set(xlabel="images a second", ylabel="latency, ms", xlim=(0, None), ylim=(0, None))
    panel.legend(fontsize=7)
    return figure


def _of_whom(r: Row) -> str:
    """Which requests an open loop's percentiles are of: in older records, only those answered."""
    if r["case"]["load"] == "closed":
        return ""
    return " of all requests" if isinstance(r.get("requests"), dict) else " of those answered"


def _drawn(milliseconds: float | None) -> float:
    """NaN for None, which matplotlib leaves out."""
    return nan if milliseconds is None else milliseconds


def _scaling(rows: list[Row]) -> Foreign:
    """A column per component: over the size at the first batch, and per image over the batch at the first size."""
    components = list(_by(rows, "component"))
    figure, panels = _pyplot().subplots(2, len(components), figsize=(4 * len(components), 6.4), squeeze=False)
    for ((component,), group), upper, lower in zip(components, panels[0], panels[1], strict=True):
        size, batch = group[0]["case"]["size"], group[0]["case"]["batch"]
        for (engine,), mine in _by(group, "engine"):
            over_size = sorted((r for r in mine if r["case"]["batch"] == batch), key=_area)
            upper.plot([r["case"]["size"] for r in over_size], [r["ms"]["p50"] for r in over_size], "o-", label=engine)
            over_batch = [r for r in mine if r["case"]["size"] == size]
            batches = [r["case"]["batch"] for r in over_batch]
            each = [r["ms"]["p50"] / r["case"]["batch"] for r in over_batch]
            lower.plot(batches, each, "o-", label=engine)
            lower.set_xticks(batches)
        upper.set(title=component, xlabel="size", yscale="log", ylabel=f"ms a call, batch {batch}, p50")
        lower.set(xlabel="batch", ylabel=f"ms an image, size {size}, p50", ylim=(0, None))
    panels[0][0].legend(fontsize=7)
    return figure


def _area(r: Row) -> int:
    return prod(int(side) for side in r["case"]["size"].split("x") if side.isdecimal())


def _simulation(rows: list[Row]) -> Foreign:
    """p95 latency by kind of client over the load, one panel per number of GPUs; left out where it is None."""
    machines = list(_by([r for r in rows if r["case"]["load"] <= 1], "gpus"))
    kinds = sorted(rows[0]["by_kind"])  # each row names them in the order in which they came
    figure, panels = _pyplot().subplots(1, len(machines), figsize=(4 * len(machines), 4.2), sharey=True, squeeze=False)
    for ((gpus,), group), panel in zip(machines, panels[0], strict=True):
        for ((policy,), mine), style in zip(_by(group, "policy"), ("-", "--"), strict=True):
            for colour, kind in enumerate(kinds):
                values = [_drawn(r["by_kind"][kind]["latency_ms"]["p95"]) / 1e3 for r in mine]
                loads = [r["case"]["load"] for r in mine]
                panel.plot(loads, values, style, color=f"C{colour}", label=f"{kind}, {policy}")
        panel.set(title=f"{gpus} GPU", xlabel="load", yscale="log")
    whom = " of all requests" if "requests" in rows[0] else " of those answered"  # in older records
    panels[0][0].set_ylabel(f"p95 latency{whom}, seconds")
    panels[0][0].legend(fontsize=7)
    return figure


PLOTS: dict[str, Callable[[list[Row]], Foreign]] = {
    "image": _stages,
    "service": _service,
    "components": _scaling,
    "simulation": _simulation,
}
