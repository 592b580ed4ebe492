"""The table of `zserve bench service`."""

import pytest

from benchmarks.record import read
from benchmarks.service import _show
from tests.conftest import ROOT


def test_calls_for_jpeg_have_a_line_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    rows = read(ROOT / "benchmarks/results/service_h200.json")["rows"]
    _show(rows)
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    (jpeg,) = ([cell.strip() for cell in line if cell] for line in lines if line[0].startswith("one at a time, JPEG"))
    (measured,) = (r for r in rows if "jpeg_ms" in r)
    assert jpeg[:4] == ["one at a time, JPEG", "1", "aotinductor", str(measured["jpeg_ms"]["n"])]
    assert jpeg[4] == f"{measured['jpeg_ms']['p50']:.2f}"
    assert jpeg[-2] == f"{measured['jpeg_overhead_ms']['p50']:.2f}"
