"""How far a stage is, and what it prints on the way."""

import time
from typing import Protocol


class Limits(Protocol):
    """What ends a stage."""

    @property
    def steps(self) -> int: ...
    @property
    def limit_seconds(self) -> float: ...


class Progress:
    """The share of a stage done: by its steps, or by its time limit where that comes first."""

    def __init__(self, name: str, steps: int, limit_seconds: float, spent: tuple[int, float] = (0, 0.0)) -> None:
        self.name, self.steps, self.limit_seconds = name, steps, limit_seconds
        self.step, already = spent
        self.started = time.monotonic() - already

    @classmethod
    def of(cls, name: str, limits: Limits) -> "Progress":
        return cls(name, limits.steps, limits.limit_seconds)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def share(self) -> float:
        return max(self.step / self.steps, self.seconds / self.limit_seconds)

    def report(self, **figures: float) -> None:
        """One line: the stage, its step, its seconds and the figures given."""
        shown = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"{self.name} step {self.step} {self.seconds:.0f} s ({self.share:.0%}) {shown}", flush=True)
