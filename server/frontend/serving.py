"""One request from its admission to its end: wait for a worker, pass its events on, and again if it is lost."""

import logging
import time
from asyncio import wait_for
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

from server.errors import PoisonRequestError, WorkerLostError
from server.frontend.metrics import Metrics
from server.frontend.queue import ModelQueue
from server.requests import Completed, Event, GenerationRequest, Image, Progress, Queued, Started

log = logging.getLogger(__name__)

POISON = 2  # a request that has ended so many workers is not given to another


class Serving:
    """A request that has a place in a queue, from the moment this is made until `events` ends.

    Raises:
        ZServeError: the queue does not take the request.
    """

    def __init__(self, queue: ModelQueue, request: GenerationRequest, *, max_retries: int, metrics: Metrics) -> None:
        self._arrived = time.monotonic()
        self._queue, self._request = queue, request
        self._max_retries, self._metrics = max_retries, metrics
        self._place = queue.enter(request)
        self._sent: set[int] = set()  # images, by index: an attempt after the first makes them all again

    async def events(self) -> AsyncGenerator[Event, None]:
        """Everything that is to be told, across all attempts."""
        try:
            while True:
                async for standing in self._wait():
                    yield standing
                try:
                    async for event in self._attempt():
                        yield event
                    return
                except WorkerLostError as error:
                    self._survive(error)
        finally:
            self._queue.leave(self._place)

    async def _wait(self) -> AsyncIterator[Queued]:
        """Until there is a worker: the place's position, whenever it has changed."""
        place, told = self._place, None
        while place.worker is None:
            if place.refused is not None:
                raise place.refused
            if place.standing is not None and place.standing is not told:
                told = place.standing
                yield told
            try:
                await wait_for(place.moved.wait(), self._queue.patience(place))
            except TimeoutError:
                self._queue.time_out(place)
            place.moved.clear()

    async def _attempt(self) -> AsyncIterator[Event]:
        """The events of one worker."""
        assert self._place.worker is not None, "the place has no worker"
        waited = time.monotonic() - self._arrived
        request = self._request
        if request.timeout is not None:
            request = replace(request, timeout=max(0.001, request.timeout - waited))
        async with aclosing(self._place.worker.generate(request)) as events:
            async for event in events:
                passed_on = self._pass_on(event, waited)
                if passed_on is not None:
                    yield passed_on

    def _pass_on(self, event: Event, waited: float) -> Event | None:
        """What the client is told when a worker says `event`; None for what it knows."""
        match event:
            case Started():
                self._place.started = True
                return replace(event, attempt=self._place.attempts)
            case Progress():
                self._place.steps_done += 1
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
        """Back to the queue, unless this was once too often.

        Raises:
            ZServeError: the request ends here.
        """
        place, request = self._place, self._request
        self._queue.lose(place)
        if place.strikes >= POISON:
            self._metrics.poisoned.labels(self._queue.config.name).inc()
            log.error("request %s is refused: %d workers ended with it; %r", request.request_id, POISON, request)
            raise PoisonRequestError(
                f"{POISON} worker processes ended while they drew request {request.request_id}, the last one with "
                "nothing else to do; do not send it again as it is"
            )
        if place.attempts > self._max_retries:
            error.retry_after = 1.0
            raise error
        self._queue.rejoin(place)
        log.warning("request %s starts over from its seed: %s", request.request_id, error)
        self._metrics.retries.labels(self._queue.config.name).inc()
