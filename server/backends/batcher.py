"""Triton's dynamic batching for backends that run whole requests: priorities, limits, timeouts, several instances."""

import asyncio
import bisect
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from server.errors import QueueFullError, QueueTimeoutError, ZServeError
from server.queue_policy import QueuePolicy, TimeoutAction
from server.statistics import Spent, Statistics
from server.tensors import InferRequest

Execute = Callable[[list[InferRequest]], Awaitable[None]]


@dataclass(order=True, kw_only=True)
class _Waiting:
    """A waiting request; they sort in the order in which they run."""

    priority: int
    delayed: bool = False  # its queue timeout has passed: behind all others of its level
    number: int  # in order of arrival
    request: InferRequest = field(compare=False)
    done: "asyncio.Future[Spent]" = field(compare=False)
    arrived: float = field(compare=False, default_factory=time.monotonic)
    queued: bool = field(compare=False, default=False)  # still in the queue, even if it has been cancelled


class Batcher:
    """Gathers requests and runs each batch, of at most `max_batch_size` rows, on one of `instances`."""

    def __init__(
        self, execute: Execute, statistics: Statistics, *, policy: QueuePolicy, max_batch_size: int, instances: int
    ) -> None:
        self._execute = execute
        self._statistics = statistics
        self._policy = policy
        self._max_rows = max_batch_size
        self._free = instances
        self._waiting: list[_Waiting] = []  # sorted
        self._numbers = itertools.count()
        self._alarm: asyncio.TimerHandle | None = None
        self._executing: set[asyncio.Task[Any]] = set()  # what executes now: tasks of batches, and requests' own
        self._closed: ZServeError | None = None

    async def run(self, request: InferRequest) -> Spent:
        """Returns when the request's batch has run.

        Raises:
            QueueFullError: as many of its priority wait as the policy allows.
            QueueTimeoutError: it waited for too long.
            ZServeError: the batcher is closed, with the error of `close`.
        """
        if self._closed is not None:
            raise self._closed
        if self._free and not self._policy.max_delay:  # and so nobody waits
            self._free -= 1
            return await self._run_batch([request], queued=0)
        priority = self._policy.level_of(request.priority)
        self._check_room(request, priority)
        return await self._wait(request, priority)

    def close(self, error: ZServeError) -> None:
        """Ends every request with `error`: those that wait, those that are executed, and those to come."""
        self._closed = error
        for place in self._waiting:  # until its `_wait` goes on
            if not place.done.done():
                place.done.set_exception(error)
        for task in self._executing:
            task.cancel()

    def _check_room(self, request: InferRequest, priority: int) -> None:
        most = self._policy.of(priority).max_size
        if most is not None and sum(place.priority == priority for place in self._waiting) >= most:
            raise QueueFullError(f"max_queue_size {most} of model {request.model.name!r} is reached")

    async def _wait(self, request: InferRequest, priority: int) -> Spent:
        loop = asyncio.get_running_loop()
        place = _Waiting(priority=priority, number=next(self._numbers), request=request, done=loop.create_future())
        self._put_in(place)
        seconds = self._policy.of(priority).timeout_of(request.queue_timeout)
        timer = None if seconds is None else loop.call_later(seconds, self._expire, place)
        self._dispatch()
        try:
            return await place.done
        finally:
            if timer is not None:
                timer.cancel()
            if place.queued:
                self._take_out([place])

    def _expire(self, place: _Waiting) -> None:
        if place.done.done() or not place.queued:  # cancelled, it is still there until `_wait` goes on
            return
        self._take_out([place])
        if self._policy.of(place.priority).on_timeout is TimeoutAction.DELAY:
            place.delayed = True
            self._put_in(place)
        else:
            place.done.set_exception(QueueTimeoutError("Request timeout expired"))

    def _put_in(self, place: _Waiting) -> None:
        bisect.insort(self._waiting, place)
        place.queued = True
        self._statistics.pending += 1

    def _take_out(self, places: Iterable[_Waiting]) -> None:
        for place in places:
            self._waiting.remove(place)
            place.queued = False
            self._statistics.pending -= 1

    def _dispatch(self) -> None:
        """Starts batches while there is an instance for them; a batch that may still grow waits out its delay."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        while self._free and self._waiting:
            batch = self._next_batch()
            missing = self._seconds_to_wait(batch)
            if missing > 0:
                self._alarm = asyncio.get_running_loop().call_later(missing, self._dispatch)
                return
            self._take_out(batch)
            self._start(batch)

    def _next_batch(self) -> list[_Waiting]:
        """The first in line, and those after it that fit into a batch with it, up to a preferred size if one is met."""
        first = self._waiting[0].request
        rows, preferred = 0, 0
        batch: list[_Waiting] = []
        for place in self._waiting:
            size = place.request.batch_size
            if batch and (rows + size > self._max_rows or _row_shape(place.request) != _row_shape(first)):
                break
            batch.append(place)
            rows += size
            if rows in self._policy.preferred_batch_sizes:
                preferred = len(batch)
        return batch[: preferred or None]

    def _seconds_to_wait(self, batch: list[_Waiting]) -> float:
        """Counted from the oldest arrival, so that later ones do not put the batch off."""
        rows = sum(p.request.batch_size for p in batch)
        followed = len(batch) < len(self._waiting)  # by one that does not fit, so this batch cannot grow
        if followed or rows >= self._max_rows or rows in self._policy.preferred_batch_sizes:
            return 0.0
        return self._policy.max_delay - (time.monotonic() - min(p.arrived for p in batch))

    def _start(self, batch: list[_Waiting]) -> None:
        self._free -= 1  # now, not when the task begins: the next batch must not take the same instance
        task = asyncio.create_task(self._finish(batch))

        def stop_if_unwanted(_: "asyncio.Future[Spent]") -> None:
            if all(place.done.cancelled() for place in batch):
                task.cancel()

        for place in batch:
            place.done.add_done_callback(stop_if_unwanted)

    async def _finish(self, batch: list[_Waiting]) -> None:
        now = time.monotonic()
        queued = [int(1e9 * (now - p.arrived)) for p in batch]
        try:
            spent = await self._run_batch([p.request for p in batch], queued[0])
        except Exception as error:  # noqa: BLE001 - whatever it is, it answers every request in the batch
            for place in batch:
                if not place.done.done():
                    place.done.set_exception(error)
            return
        for place, waited in zip(batch, queued, strict=True):
            if not place.done.done():
                place.done.set_result(replace(spent, queue=waited))

    async def _run_batch(self, requests: list[InferRequest], queued: int) -> Spent:
        """Runs on the instance that the caller has taken, and gives it back."""
        began, task = time.monotonic_ns(), asyncio.current_task()
        assert task is not None, "it runs in a task"
        self._executing.add(task)
        try:
            if self._closed is not None:  # since this batch was put together
                raise self._closed
            await self._execute(requests)
        except asyncio.CancelledError:
            if self._closed is None:
                raise
            task.uncancel()
            raise self._closed from None
        finally:
            self._executing.discard(task)
            self._free += 1
            if self._waiting:
                self._dispatch()
        spent = Spent(queue=queued, compute_infer=time.monotonic_ns() - began)
        self._statistics.executed(sum(r.batch_size for r in requests), spent)
        return spent


def _row_shape(request: InferRequest) -> dict[str, tuple[int, ...]]:
    return {name: t.shape[1:] for name, t in request.inputs.items()}
