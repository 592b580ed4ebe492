"""How busy a worker has been: the share of the last while in which there was anything to do."""

from math import exp

MEMORY = 10.0  # seconds: what was so long ago counts e times less than what is now
MOST = 0.9  # that is told: of a queue that nearly never ends, too much would be expected


class Load:
    """Told when there begins to be work and when there is none; policy, so it takes its time from the caller."""

    def __init__(self) -> None:
        self._share, self._noted, self._busy = 0.0, 0.0, False

    def note(self, now: float, *, busy: bool) -> None:
        """From `now` on there is work, or there is none."""
        fading = exp(-max(0.0, now - self._noted) / MEMORY)
        self._share = fading * self._share + (1 - fading) * self._busy
        self._noted, self._busy = now, busy

    @property
    def share(self) -> float:
        """Of the time until it was last told anything; 0 to `MOST`."""
        return min(self._share, MOST)
