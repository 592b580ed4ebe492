"""Clocks: what a stage takes on the device, and calls that are measured side by side."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Stopwatch(Protocol):
    """Marks in a device's order of work."""

    def mark(self) -> Any:
        """A mark behind the work that the device has been given so far."""

    def milliseconds(self, begin: Any, end: Any) -> float:
        """The time between two marks; waits until the device has passed both."""


class HostStopwatch:
    """For the CPU, where a call that has returned is done."""

    def mark(self) -> float:
        """See `Stopwatch`."""
        return time.perf_counter()

    def milliseconds(self, begin: float, end: float) -> float:
        """See `Stopwatch`."""
        return 1e3 * (end - begin)


class CudaStopwatch:
    """Events on the current stream, so that measuring a stage does not make the host wait after it."""

    def mark(self) -> torch.cuda.Event:
        """See `Stopwatch`."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def milliseconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See `Stopwatch`."""
        end.synchronize()
        return float(begin.elapsed_time(end))


def stopwatch(device: torch.device) -> Stopwatch:
    """The one that fits `device`."""
    return CudaStopwatch() if device.type == "cuda" else HostStopwatch()


class Stages:
    """Milliseconds by stage of one run, read when it is over."""

    def __init__(self, device: torch.device) -> None:
        self._stopwatch = stopwatch(device)
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the block's time as `name`; a stage may come several times."""
        begin = self._stopwatch.mark()
        yield
        self._marks.append((name, begin, self._stopwatch.mark()))

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds by stage."""
        total: dict[str, float] = {}
        for name, begin, end in self._marks:
            total[name] = total.get(name, 0.0) + self._stopwatch.milliseconds(begin, end)
        return total


def side_by_side(
    calls: Mapping[str, Callable[[], T]], *, warm_up: int, repetitions: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, T]]:
    """Milliseconds of every call in every repetition, and what each call returned last.

    Each repetition makes each call `calls_a_turn` times, and times the last. Each starts with a different call, so that
    a drift of the machine's speed affects all.
    """
    watch, untimed = stopwatch(device), calls_a_turn(device) - 1
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    last: dict[str, T] = {}
    for repetition in range(-warm_up, repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(untimed):
                calls[name]()
            begin = watch.mark()
            last[name] = calls[name]()
            milliseconds = watch.milliseconds(begin, watch.mark())
            if repetition >= 0:
                taken[name].append(milliseconds)
    return taken, last


def calls_a_turn(device: torch.device) -> int:
    """How often a call is made in its turn; on a CPU twice, so that the timed one follows one like it.

    The threads of the library that was called before keep spinning for some milliseconds, on the same cores: ONNX
    Runtime's prompt encoder took 3 to 13 ms on two cores after eager's, and 2.4 to 3.0 after its own.
    """
    return 1 if device.type == "cuda" else 2
