"""Every picture is drawn, from records that are made up."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot

from benchmarks.plots import PLOTS, draw
from benchmarks.record import Record, percentiles
from tests.conftest import ROOT
from tests.unit.benchmarks.records import components, engine_row, record

LATENCY = percentiles([1.0, 2.0])


UNANSWERED = LATENCY | {"p95": None, "p99": None}


def loaded(load: str, **point: Any) -> dict[str, Any]:
    return {"case": {"load": load, "engine": "onnxruntime", **point}, "ms": LATENCY, "throughput": 3.0, "goodput": 2.0}


def point(policy: str, load: float) -> dict[str, Any]:
    return {"case": {"gpus": 1, "load": load, "policy": policy}, "by_kind": {"batch": {"latency_ms": UNANSWERED}}}


RECORDS = {
    "components": components(),
    "image": record("image", *(engine_row(e, 3.0, batch=b) for b in (1, 2) for e in ("diffusers", "onnxruntime"))),
    "service": record(
        "service",
        {"case": {"load": "one at a time", "size": "64x64", "engine": "onnxruntime"}, "ms": LATENCY},
        loaded("closed", clients=1, size="64x64") | {"requests": 3},
        loaded("open", share=0.8, size="64x64") | {"ms": UNANSWERED, "requests": {"offered": 3}},
        loaded("open", share=2.0, size="64x64") | {"ms": dict.fromkeys(LATENCY), "requests": {"offered": 3}},
    ),
    "older service": record(
        "service",
        {"case": {"load": "one at a time", "engine": "onnxruntime"}, "ms": LATENCY},
        *(loaded("closed", clients=clients) for clients in (1, 2)),
        loaded("open", share=0.5),
        loaded("open", share=2.0) | {"ms": None},
    ),
    "simulation": record("simulation", *(point(policy, load) for load in (0.5, 3.0) for policy in ("planner", "fifo"))),
}


@pytest.mark.parametrize("name", list(RECORDS))
def test_every_picture_is_drawn(name: str, tmp_path: Path) -> None:
    drawn: Record = RECORDS[name]
    draw(drawn, tmp_path / "new" / "a.svg")
    draw(drawn, tmp_path / "a.png")
    text = (tmp_path / "new" / "a.svg").read_text()
    assert text.startswith("<?xml")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw(drawn, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


def legend(name: str) -> list[str]:
    figure = PLOTS["service"](RECORDS[name]["rows"])
    (panel,) = figure.axes
    pyplot.close(figure)
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_a_percentile_says_whose_it_is() -> None:
    assert "onnxruntime, 64x64, closed loop by clients, p50" in legend("service")
    assert "onnxruntime, 64x64, open loop by share, p95 of all requests" in legend("service")
    assert "onnxruntime, open loop by share, p95 of those answered" in legend("older service")


@pytest.mark.parametrize(
    ("name", "device", "where"),
    [
        ("older service", "cuda:1", "an H100, 2026"),
        ("older service", None, "an H100, 2026"),
        ("older service", "cpu", "2 cores of one, 2026"),
        ("simulation", None, "simulated, 2026"),
    ],
)
def test_the_title_names_what_computed(name: str, device: str | None, where: str, tmp_path: Path) -> None:
    """A machine with a GPU may be measured without it; older records do not all say."""
    drawn = RECORDS[name]
    settings = {} if device is None else {"device": device}
    titled = drawn | {"machine": drawn["machine"] | {"gpu": "an H100"}, "settings": settings}
    draw(titled, tmp_path / "a.svg")
    assert f"<!-- {where}" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("commit", "told"),
    [("0123456789abcdef", "01234567 --"), ("0123456789abcdef+", "01234567+ --"), (None, "no commit --")],
)
def test_the_title_names_the_code(commit: str | None, told: str, tmp_path: Path) -> None:
    """With a + where it had changes; outside a checkout there is no commit."""
    draw(RECORDS["image"] | {"commit": commit}, tmp_path / "a.svg")
    assert f"2026-01-02, {told}" in (tmp_path / "a.svg").read_text()


def test_a_kind_of_client_has_one_colour_in_all_panels() -> None:
    """The legend is in the first; rows name the kinds in the order in which they came."""
    rows = [
        {
            "case": {"gpus": gpus, "load": 0.5, "policy": policy},
            "by_kind": {kind: {"latency_ms": LATENCY} for kind in kinds},
        }
        for gpus, kinds in ((1, "ab"), (2, "ba"))
        for policy in ("planner", "fifo")
    ]
    figure = PLOTS["simulation"](rows)
    one, other = ({line.get_label(): line.get_color() for line in panel.get_lines()} for panel in figure.axes)
    assert one == other
    assert len(set(one.values())) == 2
    pyplot.close(figure)


def test_every_record_that_is_kept_can_be_drawn(tmp_path: Path) -> None:
    kept = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("service_*.json")]
    assert kept
    for number, old in enumerate(kept):
        draw(old, tmp_path / f"{number}.svg")
