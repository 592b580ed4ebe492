"""Percentiles, rows and the files they are kept in."""

import json
from pathlib import Path

import pytest

from benchmarks.load import CLIENTS, Arrival, Mix, Outcome, poisson, summary
from benchmarks.record import BenchmarkError, figures, percentiles, provenance, ratios, read, row, write
from tests.unit.benchmarks.records import components


def test_percentiles_are_interpolated_and_say_how_many() -> None:
    assert percentiles([float(n) for n in range(101)]) == {
        "p10": 10.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "n": 101,
    }  # fmt: skip
    assert percentiles([7.0])["p99"] == 7.0
    with pytest.raises(BenchmarkError, match="nothing was measured"):
        percentiles([])


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


@pytest.mark.parametrize("text", ["", "[]", '{"benchmark": "x"}', json.dumps({"rows": []})])
def test_what_is_no_record_is_told_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BenchmarkError, match=r"a\.json .*--output"):
        read(tmp_path / "a.json")
    with pytest.raises(BenchmarkError, match="cannot be read"):
        read(tmp_path / "missing.json")


def test_a_record_says_where_it_comes_from() -> None:
    told = provenance()
    assert told["machine"]["cores"] >= 1
    assert told["versions"]["torch"]
    assert set(told) == {"machine", "versions", "commit", "date"}


def test_arrivals_are_the_same_for_every_policy_and_keep_their_rate() -> None:
    mix = Mix({(128, 128): 1.0, (256, 256): 1.0}, unit=2.0)
    arrivals = list(poisson(20.0, 50.0, mix, seed=3))
    assert arrivals == list(poisson(20.0, 50.0, mix, seed=3))
    assert 900 < len(arrivals) < 1100
    assert {a.kind for a in arrivals} == set(CLIENTS)
    assert {a.patience for a in arrivals} == {16.0, 80.0, None}


def test_goodput_counts_what_came_in_time() -> None:
    arrival = Arrival(at=0.0, kind="all", size=(64, 64), priority=0, patience=1.0)
    told = summary([Outcome(arrival, 0.5), Outcome(arrival, 3.0), Outcome(arrival, None)], seconds=2.0)
    assert (told["requests"], told["seconds"]) == (3, 3.0)  # the last answer came after the last arrival
    assert told["throughput"] == pytest.approx(2 / 3)
    assert told["goodput"] == pytest.approx(1 / 3)
    assert told["latency_ms"]["n"] == 2
    assert told["by_kind"]["all"]["good"] == pytest.approx(1 / 3)
