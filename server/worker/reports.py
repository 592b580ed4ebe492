"""What there is to tell of requests, kept until it is told: at a time when the device does not wait for the host."""

from collections.abc import Mapping

from server.requests import Queued
from server.worker.events import Listener, LoopEvent
from server.worker.planner import Forecast


class Reports:
    """The listeners of the requests that are under way, and what they have not heard yet."""

    def __init__(self) -> None:
        self._listeners: dict[int, Listener] = {}
        self._positions: dict[int, int] = {}  # by key, the queue position that was noted last
        self._untold: list[tuple[Listener, LoopEvent]] = []

    def follow(self, key: int, listener: Listener) -> None:
        """From now on what happens to the request is noted."""
        self._listeners[key] = listener

    def forget(self, key: int) -> None:
        """Nothing more is noted of it; what was noted is still told."""
        self._listeners.pop(key, None)

    def follows(self, key: int) -> bool:
        """Whether the request is still under way."""
        return key in self._listeners

    def note(self, key: int, event: LoopEvent) -> None:
        """`event` is told next time, if anyone wants to know it."""
        listener = self._listeners.get(key)
        if listener is not None:
            self._untold.append((listener, event))

    def note_positions(self, forecasts: Mapping[int, Forecast], now: float) -> None:
        """Of those that have not begun, where they stand, where that has changed."""
        for key, forecast in forecasts.items():
            if self._positions.get(key) != forecast.position:
                self.note(key, Queued(forecast.position, 1e3 * (forecast.starts - now)))
        self._positions = {key: forecast.position for key, forecast in forecasts.items()}

    def tell(self) -> None:
        """Tells the listeners what has happened, in order."""
        untold, self._untold = self._untold, []
        for listener, event in untold:
            listener(event)
