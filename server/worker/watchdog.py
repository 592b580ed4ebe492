"""Notices a device that does not come back from what it was given."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

LATE = 20.0  # work that takes this many times its expected seconds, plus the watchdog's patience, has hung


@dataclass(frozen=True)
class Running:
    """Work that the device has been given: when it began, and the seconds that it should take."""

    began: float
    expected: float


class Watchdog:
    """Says whether the device has hung; safe from any thread. `patience`: seconds that any work may take."""

    def __init__(self, clock: Callable[[], float], patience: float) -> None:
        self._clock, self.patience = clock, patience
        self._due = float("inf")  # when the first of what is running counts as hung

    @property
    def hung(self) -> bool:
        """Whether something should have been done long ago."""
        return self._clock() >= self._due

    def watch(self, running: Running) -> None:
        """Watches this too."""
        self._due = min(self._due, self._latest(running))

    def watch_only(self, running: Iterable[Running]) -> None:
        """Watches these, and nothing that was given before."""
        self._due = min(map(self._latest, running), default=float("inf"))

    def _latest(self, running: Running) -> float:
        return running.began + self.patience + LATE * running.expected
