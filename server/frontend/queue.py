"""The requests of one model: waiting in the order of their turns, or with a worker. Policy only; it takes a clock.

A worker orders the requests it has step by step; the others wait here, where they may still be refused.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from server.config import ModelConfig
from server.errors import DeadlinePassedError, ModelNotReadyError, QueueFullError, QueueTimeoutError, ZServeError
from server.frontend.assignment import Assignment, Place
from server.frontend.forecast import Forecast
from server.frontend.workers import Worker, WorkerState
from server.queue_policy import TimeoutAction
from server.requests import GenerationRequest, Queued
from server.statistics import Statistics
from server.turns import Claim, Rank, Turns

BATCHING_GAIN = 0.7  # batching may shorten a wait to this share of the forecast, but not further
MOST_LEVELS_SHOWN = 16  # a model may have any number of levels; a metric should not have that many series
TELL_EVERY = 0.25  # seconds between two position updates for waiting requests


class ModelQueue:
    """The workers of one model, and every request that waits for one or has one."""

    def __init__(
        self, config: ModelConfig, workers: Iterable[Worker] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.workers = list(workers)
        self.statistics = Statistics()
        self.loaded = False  # all its workers have been ready once; set by the backend that loads it
        self._clock = clock
        self._turns = Turns[Place](lambda place: place.claim)
        self._assignment = Assignment(self.workers, 2 * config.max_batch_size, self._rank)
        self._telling: asyncio.TimerHandle | None = None
        self._closed: ZServeError | None = None

    @property
    def version(self) -> str:
        """The version that its workers serve."""
        return self.workers[0].config.version if self.workers else ""

    @property
    def waiting(self) -> int:
        """Requests that no worker has taken yet."""
        return len(self._turns)

    @property
    def depths(self) -> dict[int, int]:
        """`waiting` by priority, including levels where none waits; safe from any thread."""
        waiting = Counter(place.request.priority for place in self._turns.items())
        shown = range(1, min(self.config.queue.levels, MOST_LEVELS_SHOWN) + 1)
        return {level: waiting[level] for level in {*shown, *waiting}}

    @property
    def running(self) -> int:
        """Requests that a worker has."""
        return self._assignment.running

    @property
    def ready(self) -> bool:
        """Whether at least one worker serves."""
        return bool(self._assignment.ready())

    @property
    def reason(self) -> str:
        """Why the model is not ready."""
        return "; ".join(f"{w.config.instance}: {w.reason}" for w in self.workers if w.reason)

    @property
    def retry_after(self) -> float:
        """Seconds after which another place should be free: when the first in the queue starts."""
        forecasts = self._assignment.forecasts(self._turns.ordered(self._clock())[:1])
        return max(1.0, *(f.start for f in forecasts)) if forecasts else 1.0

    def held(self, worker: Worker) -> Sequence[Place]:
        """The places that `worker` holds."""
        return self._assignment.held(worker)

    def enter(self, request: GenerationRequest) -> Place:
        """Takes a place in the queue.

        Raises:
            ModelNotReadyError: no worker serves or is about to again.
            QueueFullError: as many wait as the policy allows.
            DeadlinePassedError: it could not be done before its deadline.
            ZServeError: the queue is closed, with the error of `close`.
        """
        now = self._clock()
        if self._closed is not None:
            raise self._closed
        self._check_ready()
        policy = self.config.queue.of(request.priority)
        self._check_room(request.priority, policy.max_size)
        timeout = policy.timeout_of(request.queue_timeout)
        place = Place(
            request,
            Claim(request.priority, now, None if request.timeout is None else now + request.timeout),
            queue_timeout_at=float("inf") if timeout is None else now + timeout,
        )
        self._turns.add(place, now)
        position, forecast = self._standing(place)
        try:
            self._check_deadline(place, forecast)
        except ZServeError:
            self._turns.remove([place])
            raise
        self.change()
        if place.worker is None:
            self._tell(place, position, forecast)
        return place

    def leave(self, place: Place) -> None:
        """Gives the place up, whether or not it had a worker; others move up."""
        self._take_out(place)
        self.change()

    def lose(self, place: Place, *, reached: bool | None) -> None:
        """Records that the place's worker was lost: if the request had `reached` it, perhaps because of that.

        Where that is not known (None), it is a doubt, which counts once the request has had all its attempts.

        Raises:
            ZServeError: the queue is closed and its workers are being stopped, which is no request's fault.
        """
        if self._closed is not None:
            raise self._closed
        place.losses += 1
        if place.started or (place.alone and reached):
            place.strikes += 1
        elif place.alone and reached is None:
            place.doubts += 1
        place.queue_timeout_at = float("inf")  # it got its worker in time; the loss is not its own delay
        self._take_out(place)
        place.started, place.steps_done, place.standing = False, {}, None
        self.change()

    def rejoin(self, place: Place) -> None:
        """Puts the place back where it waited, its turn unchanged."""
        self._turns.add(place, self._clock())
        self.change()

    def time_out(self, place: Place) -> None:
        """Applies the policy to a place that has waited for too long; does nothing to others.

        Raises:
            DeadlinePassedError: its deadline cannot be met any more.
            QueueTimeoutError: its queue timeout has passed.
        """
        if place.worker is not None:
            return
        now = self._clock()
        if place.claim.deadline is not None:
            _, forecast = self._standing(place)
            self._check_deadline(place, forecast)
        if now < place.queue_timeout_at:
            return
        policy = self.config.queue.of(place.request.priority)
        if policy.on_timeout is TimeoutAction.REJECT:
            waited = now - place.claim.arrived
            raise QueueTimeoutError(
                f"no worker was free within the queue timeout ({waited:.3g} s); try again later",
                retry_after=self.retry_after,
            )
        self._turns.remove([place])
        place.queue_timeout_at = float("inf")
        place.claim = replace(place.claim, delayed=True)
        self._turns.add(place, now)

    def patience(self, place: Place) -> float | None:
        """Seconds until `time_out` may act on `place`; None for never."""
        latest = place.queue_timeout_at
        if place.claim.deadline is not None:
            latest = min(latest, place.claim.deadline - self._assignment.seconds(place))
        return None if latest == float("inf") else max(0.0, latest - self._clock())

    def close(self, error: ZServeError) -> None:
        """Answers waiting requests, and those that lose their worker from now on, with the first `error`."""
        self._closed = self._closed or error
        for place in self._turns.ordered(self._clock()):
            place.refused = self._closed
            place.moved.set()

    def change(self) -> None:
        """Reacts to a change: workers with room go to waiting requests, and these learn where they stand."""
        self._turns.remove(self._assignment.assign(self._turns.ordered(self._clock())))
        if self._telling is None and len(self._turns):
            self._telling = asyncio.get_running_loop().call_later(TELL_EVERY, self._tell_all)

    def _take_out(self, place: Place) -> None:
        self._turns.remove([place])
        self._assignment.release(place)

    def _rank(self, place: Place) -> Rank:
        return place.claim.rank(self._clock())

    def _tell_all(self) -> None:
        """Tells all that wait their position and expected start, where the position has changed."""
        self._telling = None
        ordered = self._turns.ordered(self._clock())
        forecasts: Sequence[Forecast | None] = self._assignment.forecasts(ordered) or [None] * len(ordered)
        standings = zip(ordered, forecasts, strict=True)
        for position, (place, forecast) in enumerate(standings, self._assignment.unstarted):
            if place.standing is None or place.standing.position != position:
                self._tell(place, position, forecast)

    def _tell(self, place: Place, position: int, forecast: Forecast | None) -> None:
        place.standing = Queued(position, None if forecast is None else 1e3 * forecast.start)
        place.moved.set()

    def _standing(self, place: Place) -> tuple[int, Forecast | None]:
        """A waiting place's position, and its forecast while a worker serves."""
        ordered = self._turns.ordered(self._clock())
        up_to_it = ordered[: ordered.index(place) + 1]
        forecasts = self._assignment.forecasts(up_to_it)
        return self._assignment.unstarted + len(up_to_it) - 1, None if forecasts is None else forecasts[-1]

    def _check_ready(self) -> None:
        if self.ready or any(w.state is WorkerState.RESTARTING for w in self.workers):
            return
        raise ModelNotReadyError(
            f"model {self.config.name!r} is not ready ({self.reason}); try again later", retry_after=5.0
        )

    def _check_room(self, priority: int, max_size: int | None) -> None:
        level = [p for p in self._turns.ordered(self._clock()) if p.request.priority == priority]
        if max_size is not None and len(level) >= max_size:
            raise QueueFullError(
                f"model {self.config.name!r} has {len(level)} requests of priority {priority} waiting; max_queue_size "
                f"{max_size} is reached. Try again later",
                retry_after=self.retry_after,
            )

    def _check_deadline(self, place: Place, forecast: Forecast | None) -> None:
        """Raises DeadlinePassedError if, by the measured costs, a waiting place cannot meet its deadline."""
        if place.claim.deadline is None:
            return
        now, forecast = self._clock(), forecast or Forecast(0.0, self._assignment.seconds(place))
        wait, own = forecast.start, forecast.takes
        if now + BATCHING_GAIN * wait + own >= place.claim.deadline:
            left = max(0.0, place.claim.deadline - now)
            raise DeadlinePassedError(
                f"the deadline, {left:.3g} s from now, cannot be met: the request needs {own:.3g} s of the device, "
                f"which is free for it in {wait:.3g} s. Allow more time, or ask for fewer steps or a smaller size"
            )
