"""Two policies are compared in turn, at the same arrivals."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scheduling
from benchmarks.workload import Arrival

GOODPUT = {("planner", 0.5): 1.0, ("planner", 1.0): 2.0, ("planner", 3.0): 1.0}


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Arrival, ...]]]:
    """The policy and the arrivals of every measurement, none of which is made."""
    made: list[tuple[str, tuple[Arrival, ...]]] = []

    async def closed_rate(engines: Path, seconds: float) -> float:
        return 2.0

    async def measure(engines: Path, policy: str, arrivals: Sequence[Arrival], seconds: float) -> dict[str, Any]:
        made.append((policy, tuple(arrivals)))
        load = sum(a.at >= 0 for a in arrivals) / seconds / 2.0
        return {"goodput": GOODPUT.get((policy, load), 0.5), "by_kind": {}, "cpu_ms": {"workers": 1.0}}

    monkeypatch.setattr(scheduling, "closed_rate", closed_rate)
    monkeypatch.setattr(scheduling, "measure", measure)
    monkeypatch.setattr(scheduling, "only_backend", lambda version: "onnxruntime")
    monkeypatch.setattr(scheduling, "version_settings", lambda version, device: {})
    return made


def test_policies_take_turns_and_the_other_one_begins_the_next(
    turns: list[tuple[str, tuple[Arrival, ...]]], capsys: pytest.CaptureFixture[str]
) -> None:
    told = scheduling.run(argparse.Namespace(model=Path("m"), seconds=10.0, rounds=2))
    assert [policy for policy, _ in turns] == ["planner", "fifo", "fifo", "planner"] * 3
    assert all(a[1] == b[1] for a, b in zip(turns[::2], turns[1::2], strict=True)), "both get the same"
    assert len({arrivals for _, arrivals in turns}) == 6, "each load and round has its own"
    cases = [tuple(r["case"].values()) for r in told["rows"]]
    assert cases[:4] == [("planner", 0.5, 0), ("fifo", 0.5, 0), ("fifo", 1.0, 0), ("planner", 1.0, 0)]
    assert len(set(cases)) == 12
    assert told["overload_goodput"] == 0.5
    assert (told["settings"]["policies"], told["settings"]["rounds"]) == ("in turn", 2)
    assert "median of the rounds: 0.50" in capsys.readouterr().out


def test_patience_is_that_of_load_1_at_every_load(turns: list[tuple[str, tuple[Arrival, ...]]]) -> None:
    scheduling.run(argparse.Namespace(model=Path("m"), seconds=10.0, rounds=1))
    assert {a.patience for _, arrivals in turns for a in arrivals} == {8.0, 40.0, None}
