"""Every picture is drawn, from records that are made up."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import PLOTTED
from benchmarks.plots import PLOTS, draw
from benchmarks.record import Record, percentiles
from tests.unit.benchmarks.records import components, engine_row, record

LATENCY = percentiles([1.0, 2.0])


def loaded(load: str, **point: float) -> dict[str, Any]:
    return {"case": {"load": load, "engine": "onnxruntime", **point}, "ms": LATENCY, "throughput": 3.0, "goodput": 2.0}


def point(policy: str, load: float) -> dict[str, Any]:
    return {"case": {"gpus": 1, "load": load, "policy": policy}, "by_kind": {"batch": {"latency_ms": LATENCY}}}


RECORDS = {
    "components": components(),
    "image": record("image", *(engine_row(e, 3.0, batch=b) for b in (1, 2) for e in ("diffusers", "onnxruntime"))),
    "service": record(
        "service",
        {"case": {"load": "one at a time", "engine": "onnxruntime"}, "ms": LATENCY},
        *(loaded("closed", clients=clients) for clients in (1, 2)),
        loaded("open", share=0.5),
        loaded("open", share=2.0) | {"ms": None},
    ),
    "simulation": record("simulation", *(point(policy, load) for load in (0.5, 3.0) for policy in ("planner", "fifo"))),
}


def test_the_help_names_every_picture_there_is() -> None:
    assert set(PLOTTED) == set(PLOTS)


@pytest.mark.parametrize("benchmark", list(PLOTS))
def test_every_picture_is_drawn(benchmark: str, tmp_path: Path) -> None:
    drawn: Record = RECORDS[benchmark]
    draw(drawn, tmp_path / "new" / "a.svg")
    draw(drawn, tmp_path / "a.png")
    text = (tmp_path / "new" / "a.svg").read_text()
    assert text.startswith("<?xml")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw(drawn, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text
