"""How busy a worker has been: the recent share of time in which it had work."""

from math import exp

MEMORY = 10.0  # seconds: the time constant of the average; what was this long ago counts 1/e as much as now
MOST = 0.9  # the highest share reported: near 1, load / (1 - load) would predict far too many arrivals


class Load:
    """The load, from when work begins and ends; policy, so the caller passes the time."""

    def __init__(self) -> None:
        self._share, self._noted, self._busy = 0.0, 0.0, False

    def note(self, now: float, *, busy: bool) -> None:
        """Records whether there is work from `now` on."""
        fading = exp(-max(0.0, now - self._noted) / MEMORY)
        self._share = fading * self._share + (1 - fading) * self._busy
        self._noted, self._busy = now, busy

    @property
    def share(self) -> float:
        """The share of time with work, as of the last `note`; 0 to `MOST`."""
        return min(self._share, MOST)
