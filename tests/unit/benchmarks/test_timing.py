"""Calls side by side, and stages."""

from collections import Counter

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Stages, side_by_side

CPU = torch.device("cpu")


class Clock:
    """A stopwatch that is told the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def milliseconds(self, begin: float, end: float) -> float:
        return end - begin


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "stopwatch", lambda device: made)
    return made


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_take_turns_and_warm_up_does_not_count(clock: Clock, device: str) -> None:
    """On a CPU each call is made twice, and the second counts."""
    order: list[str] = []
    again = 2 if device == "cpu" else 1

    def call(name: str, takes: float) -> int:
        second = order[-1:] == [name] and order.count(name) % 2
        order.append(name)
        clock.now += takes if second or device == "cuda" else 100.0
        return len(order)

    calls = {"a": lambda: call("a", 5.0), "b": lambda: call("b", 7.0)}
    taken, last = side_by_side(calls, warm_up=1, repetitions=2, device=torch.device(device))
    assert taken == {"a": [5.0, 5.0], "b": [7.0, 7.0]}
    assert last == {"a": 6 * again, "b": 5 * again}  # what the last calls returned
    assert Counter(order) == {"a": 3 * again, "b": 3 * again}
    assert order[2 * again :: again] == ["a", "b", "b", "a"]  # each repetition begins with another


def test_a_stage_may_come_several_times(clock: Clock) -> None:
    stages = Stages(CPU)
    for name, takes in (("denoiser", 2.0), ("denoiser", 3.0), ("decoder", 4.0)):
        with stages.stage(name):
            clock.now += takes
        clock.now += 100.0
    assert stages.milliseconds() == {"denoiser": 5.0, "decoder": 4.0}
