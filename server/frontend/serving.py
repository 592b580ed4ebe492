"""One request from its admission to its end: wait for a worker, pass its events on, start over if it is lost.

This runs in a task of its own, however slowly the client reads: events it has not taken wait here, not in the worker,
whose room goes to the next request as soon as the last event has arrived.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from server.errors import PoisonRequestError, WorkerLostError
from server.frontend.metrics import Metrics
from server.frontend.queue import ModelQueue
from server.requests import Completed, Event, GenerationRequest, Image, Progress, Queued, Started

log = logging.getLogger(__name__)

POISON = 2  # a request that has ended this many workers is not given to another


class Serving:
    """A request with a place in a queue, from construction until `events` ends.

    Raises:
        ZServeError: the queue does not take the request.
    """

    def __init__(self, queue: ModelQueue, request: GenerationRequest, *, max_retries: int, metrics: Metrics) -> None:
        self._arrived = time.monotonic()
        self._queue, self._request = queue, request
        self._max_retries, self._metrics = max_retries, metrics
        self._place = queue.enter(request)
        self._sent: set[int] = set()  # indices of images: a further attempt makes all images again
        # What the client has not taken; None marks the end. Bounded by the number of the request's own events, which
        # follows from its steps, previews and images.
        self._untaken: deque[Event | None] = deque()
        self._told = asyncio.Event()

    async def events(self) -> AsyncGenerator[Event, None]:
        """All events for the client, across all attempts. Closing it cancels the request."""
        work = asyncio.create_task(self._work(), name=f"serve {self._request.request_id}")
        work.add_done_callback(self._end)  # not at the end of the task itself: a cancelled task may never start
        try:
            while (event := await self._next()) is not None:
                yield event
            await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _next(self) -> Event | None:
        while not self._untaken:
            self._told.clear()
            await self._told.wait()
        return self._untaken.popleft()

    def _tell(self, event: Event | None) -> None:
        if isinstance(event, Queued) and self._untaken and isinstance(self._untaken[-1], Queued):
            self._untaken.pop()  # a newer position replaces one not taken yet
        self._untaken.append(event)
        self._told.set()

    def _end(self, work: asyncio.Task[None]) -> None:
        self._queue.leave(self._place)
        self._tell(None)

    async def _work(self) -> None:
        while True:
            await self._wait()
            try:
                await self._attempt()
                return
            except WorkerLostError as error:
                self._survive(error)

    async def _wait(self) -> None:
        """Waits for a worker; reports the place's position whenever it has changed."""
        place, told = self._place, None
        while place.worker is None:
            if place.refused is not None:
                raise place.refused
            if place.standing is not None and place.standing is not told:
                told = place.standing
                self._tell(told)
            try:
                async with asyncio.timeout(self._queue.patience(place)):  # wait_for may swallow a cancel, before 3.12
                    await place.moved.wait()
            except TimeoutError:
                self._queue.time_out(place)
            place.moved.clear()

    async def _attempt(self) -> None:
        """Passes on the events of one worker."""
        assert self._place.worker is not None, "the place has no worker"
        waited = time.monotonic() - self._arrived
        request = replace(self._request, waited=waited, delayed=self._place.claim.delayed)
        if request.timeout is not None:
            request = replace(request, timeout=request.timeout - waited)
        async with aclosing(self._place.worker.generate(request)) as events:
            async for event in events:
                passed_on = self._pass_on(event, waited)
                if passed_on is not None:
                    self._tell(passed_on)

    def _pass_on(self, event: Event, waited: float) -> Event | None:
        """What the client is told on a worker's `event`; None for what it already has."""
        match event:
            case Started():
                self._place.started = True
                return replace(event, attempt=self._place.attempts)
            case Progress(step, _, index):
                self._place.steps_done[index] = step
            case Image(index) if index in self._sent:
                return None
            case Image(index):
                self._sent.add(index)
            case Completed(timings):
                queue_ms = timings.queue_ms + 1e3 * waited
                total_ms = 1e3 * (time.monotonic() - self._arrived)
                return replace(event, timings=replace(timings, queue_ms=queue_ms, total_ms=total_ms))
        return event

    def _survive(self, error: WorkerLostError) -> None:
        """Puts the request back into the queue, unless it has lost too many workers.

        Raises:
            ZServeError: the request ends here.
        """
        place, request = self._place, self._request
        self._queue.lose(place, reached=error.reached)
        is_last = place.attempts > self._max_retries
        if place.strikes + (place.doubts if is_last else 0) >= POISON:
            self._metrics.poisoned.labels(self._queue.config.name).inc()
            log.error("request %s is refused: %d workers ended with it; %r", request.request_id, POISON, request)
            raise PoisonRequestError(
                f"{POISON} worker processes ended with request {request.request_id}, the last one with nothing else to "
                "do; do not send it again as it is"
            )
        if is_last:
            error.retry_after = 1.0
            raise error
        self._queue.rejoin(place)
        log.warning("request %s starts over from its seed: %s", request.request_id, error)
        self._metrics.retries.labels(self._queue.config.name).inc()
