"""Events of requests, kept until they can be delivered without making the device wait for the host."""

from collections.abc import Mapping

from server.requests import Queued
from server.worker.events import Listener, LoopEvent
from server.worker.planner import Forecast


class Reports:
    """The listeners of the requests in progress, and the events they have not been sent yet."""

    def __init__(self) -> None:
        self._listeners: dict[int, Listener] = {}
        self._positions: dict[int, int] = {}  # by key, the queue position that was noted last
        self._untold: list[tuple[Listener, LoopEvent]] = []
        self.positions_changed = False  # whether any may have changed since they were noted last

    def follow(self, key: int, listener: Listener) -> None:
        """Notes the request's events for `listener` from now on."""
        self._listeners[key] = listener
        self.positions_changed = True

    def forget(self, key: int) -> None:
        """Notes nothing more of the request; what was noted is still told."""
        self._listeners.pop(key, None)
        self.positions_changed = True

    def follows(self, key: int) -> bool:
        """Whether the request is still followed."""
        return key in self._listeners

    def note(self, key: int, event: LoopEvent) -> None:
        """Keeps `event` for the next `tell`, if the request is followed."""
        listener = self._listeners.get(key)
        if listener is not None:
            self._untold.append((listener, event))

    def note_positions(self, forecasts: Mapping[int, Forecast], now: float) -> None:
        """Notes the queue positions that have changed, of requests that have not begun."""
        for key, forecast in forecasts.items():
            if self._positions.get(key) != forecast.position:
                self.note(key, Queued(forecast.position, 1e3 * (forecast.starts - now)))
        self._positions = {key: forecast.position for key, forecast in forecasts.items()}
        self.positions_changed = False

    def tell(self) -> None:
        """Sends the noted events to their listeners, in order."""
        untold, self._untold = self._untold, []
        for listener, event in untold:
            listener(event)
