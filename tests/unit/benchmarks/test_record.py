"""Percentiles, rows and the files they are kept in."""

import json
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.components import _line as components_line
from benchmarks.record import (
    BenchmarkError,
    Neighbours,
    figures,
    machine,
    percentiles,
    provenance,
    ratios,
    read,
    row,
    write,
)
from benchmarks.service import _percentiles as service_percentiles
from tests.unit.benchmarks.records import components, engine_row, record


def test_percentiles_are_interpolated_and_say_how_many() -> None:
    assert percentiles([float(n) for n in range(101)]) == {
        "p10": 10.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "n": 101,
    }  # fmt: skip
    assert percentiles([7.0])["p99"] == 7.0
    with pytest.raises(BenchmarkError, match="nothing was measured"):
        percentiles([])


@pytest.mark.parametrize(("count", "told"), [(1, 1), (9, 1), (10, 2), (99, 2), (100, 3)])
def test_tables_leave_out_percentiles_that_so_few_values_do_not_have(count: int, told: int) -> None:
    """The 99th percentile of twelve is their largest by another name; the record keeps it."""
    times = percentiles([float(n) for n in range(count)])
    cells = [times["p50"], times["p90"], times["p99"]][:told] + [None] * (3 - told)
    measured = engine_row("eager", 1.0) | {"ms": times, "relative_error": 0.0}
    assert components_line(measured)[-6:-3] == cells
    assert service_percentiles(times, measured) == [count, *cells]


def test_a_ratio_is_taken_pair_by_pair() -> None:
    """The machine got twice as slow in between, which is not the engines' doing."""
    assert ratios([30.0, 60.0, 62.0], [10.0, 20.0, 31.0])["p50"] == 3.0


def test_figures_are_numbers_and_medians_and_nothing_else() -> None:
    measured = row({"engine": "eager"}, ms=percentiles([1.0, 2.0, 3.0]), speedup={"eager": percentiles([2.0])}, calls=3)
    measured |= {"engines": {"denoiser": "eager"}, "good": True, "psnr_db": None}
    assert figures(measured) == {"ms": 2.0, "speedup.eager": 2.0, "calls": 3.0}


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "new" / "a.json", components())
    assert read(tmp_path / "new" / "a.json") == components()


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"benchmark": "x"}', *(json.dumps({"rows": []} | more) for more in (
        {}, {"benchmark": "x", "rows": ["text"]}, {"benchmark": "x", "rows": [{}]},
        {"benchmark": "x", "rows": [{"case": ["engine", "eager"]}]},
    ))],
)  # fmt: skip
def test_what_is_no_record_is_told_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BenchmarkError, match=r"a\.json .*--output"):
        read(tmp_path / "a.json")
    with pytest.raises(BenchmarkError, match="cannot be read"):
        read(tmp_path / "missing.json")


def test_a_record_has_no_two_rows_of_one_case(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record("components", engine_row("eager", 1.0), engine_row("eager", 2.0))))
    with pytest.raises(BenchmarkError, match="2 rows of one case"):
        read(path)


def test_a_record_says_where_it_comes_from() -> None:
    told = provenance()
    assert told["machine"]["cores"] >= 1
    assert told["versions"]["torch"]
    assert set(told) == {"machine", "versions", "commit", "date"}
    assert {"triton", "fa3_fwd", "cuda", "driver"} < set(told["versions"])


@pytest.mark.parametrize(
    ("groups", "own", "told"),
    [
        ({"": "150000 100000"}, "0::/", {"cpu_quota": 1.5}),
        ({"": "max 100000"}, "0::/", {}),
        ({"a": "400000 100000", "a/b": "max 100000"}, "1:cpu:/x\n0::/a/b", {"cpu_quota": 4.0}),
        ({"a": "100000 50000", "a/b": "300000 100000"}, "0::/a/b", {"cpu_quota": 2.0}),
        ({"": "50000 100000"}, "0::/of/the/host", {"cpu_quota": 0.5}),
        ({}, "0::/", {}),
        ({}, None, {}),
    ],
)
def test_a_record_says_what_quota_of_the_cpu_its_container_had(
    groups: dict[str, str],
    own: str | None,
    told: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The least of its group's and of those above; in a container the path may be one of the host's."""
    for name, text in groups.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "cpu.max").write_text(text + "\n")
    monkeypatch.setattr("export.control_groups.GROUPS", tmp_path)
    monkeypatch.setattr("export.control_groups.OWN_GROUP", tmp_path / "own")
    if own is not None:
        (tmp_path / "own").write_text(own + "\n")
    here = machine()
    assert {key: here[key] for key in here if key == "cpu_quota"} == told


@pytest.mark.parametrize(
    ("before", "after", "stolen"),
    [
        (
            {"user": 10.0, "idle": 5.0, "steal": 1.0, "guest": 10.0},
            {"user": 16, "idle": 7, "steal": 3, "guest": 16},
            0.2,
        ),
        ({"user": 10.0, "idle": 5.0}, {"user": 11.0, "idle": 6.0}, 0.0),  # a system that has no such figure
    ],
)
def test_a_record_says_what_the_host_gave_to_others(
    before: dict[str, float], after: dict[str, float], stolen: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = [namedtuple("times", times)(**times) for times in (before, after)]  # type: ignore[misc]
    monkeypatch.setattr("psutil.cpu_times", lambda: readings.pop(0))
    said = Neighbours().record()
    assert said["cpu_stolen"] == stolen
    assert said["load_average"].keys() == {"before", "after"}


def test_a_record_says_which_driver_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        nvmlInit=lambda: None, nvmlSystemGetDriverVersion=lambda: "580.159", NVMLError=RuntimeError
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert provenance()["versions"]["driver"] == "580.159"

    def missing() -> None:
        raise nvml.NVMLError

    nvml.nvmlInit = missing
    assert provenance()["versions"]["driver"] is None
