"""The frontend's `ImageService`: finds the model, answers from the cache, admits, and drains at the end."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from server.errors import ModelNotFoundError, ShuttingDownError
from server.frontend.cache import Answer, ResponseCache, ResponseKey, response_key
from server.frontend.metrics import Metrics
from server.frontend.queue import ModelQueue
from server.frontend.serving import Serving
from server.frontend.workers import WorkerState
from server.requests import Completed, Event, GenerationRequest, Image
from server.service import ModelStatus


class Dispatcher:
    """The `ImageService` of the frontend."""

    def __init__(self, metrics: Metrics, *, max_retries: int = 3, cache_bytes: int = 0) -> None:
        self._queues: dict[str, list[ModelQueue]] = {}  # by model: its versions, in the order they were loaded
        self._metrics = metrics
        self._max_retries = max_retries
        self._cache = ResponseCache(cache_bytes)
        self._accepting = True

    def add(self, queue: ModelQueue) -> None:
        """Serves another model, or another version of one."""
        self._queues.setdefault(queue.config.name, []).append(queue)
        self._metrics.expect(queue)

    def remove(self, queue: ModelQueue) -> None:
        """Accepts no more requests for `queue`; those under way continue."""
        self._cache.forget(queue)
        queues = self._queues.get(queue.config.name, [])
        if queue in queues:
            queues.remove(queue)
        if not queues:
            self._queues.pop(queue.config.name, None)

    def queues(self) -> list[ModelQueue]:
        """All queues, by model."""
        return [queue for _, queues in sorted(self._queues.items()) for queue in queues]

    def model(self, name: str) -> ModelStatus:
        """See `ImageService`."""
        return _status(self._queue(name))

    def models(self) -> list[ModelStatus]:
        """See `ImageService`."""
        return [_status(self._queue(name)) for name in sorted(self._queues)]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See `ImageService`."""
        async with aclosing(self.generate_on(self._queue(request.model), request)) as events:
            async for event in events:
                yield event

    async def generate_on(self, queue: ModelQueue, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """`generate` on one particular version of the model."""
        if not self._accepting:
            raise ShuttingDownError(
                "the server is shutting down and takes no new requests; try another one", retry_after=5.0
            )
        with self._metrics.request(queue) as record:
            async with aclosing(self._answer(queue, request)) as events:
                async for event in events:
                    record.see(event)
                    yield event

    def refuse_new(self) -> None:
        """Accepts no more requests; those under way continue."""
        self._accepting = False

    def refuse_waiting(self) -> None:
        """Answers waiting requests, and those that lose their worker from now on, with UNAVAILABLE."""
        for queue in self.queues():
            queue.close(ShuttingDownError("the server shut down before the request was done; send it to another"))

    async def _answer(self, queue: ModelQueue, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Answers from the response cache, if the model has it on and it has the answer, otherwise from a worker."""
        key = _cache_key(queue, request)
        answer = self._look_up(queue, key)
        if answer is not None:
            for kept in answer:
                yield kept
            return
        made: list[Image | Completed] = []  # for the cache; without it, each image is freed once the client has it
        serving = Serving(queue, request, max_retries=self._max_retries, metrics=self._metrics)
        async with aclosing(serving.events()) as events:
            async for event in events:
                if key is not None and isinstance(event, Image | Completed):
                    made.append(event)
                yield event
        if key is not None and queue in self.queues():  # otherwise its model was unloaded while the client was reading
            began = time.monotonic_ns()
            self._cache.put(key, tuple(made))
            queue.statistics.cache_miss.ns += time.monotonic_ns() - began

    def _look_up(self, queue: ModelQueue, key: ResponseKey | None) -> Answer | None:
        if key is None:
            return None
        began = time.monotonic_ns()
        answer = self._cache.get(key)
        self._metrics.response_cache.labels(queue.config.name, "miss" if answer is None else "hit").inc()
        figures = queue.statistics
        (figures.cache_miss if answer is None else figures.cache_hit).add(time.monotonic_ns() - began)
        return answer

    def _queue(self, name: str) -> ModelQueue:
        if not name and len(self._queues) == 1:
            name = next(iter(self._queues))
        if name not in self._queues:
            known = ", ".join(sorted(self._queues)) or "none"
            asked = f"there is no model {name!r}" if name else "the request names no model, so there has to be just one"
            raise ModelNotFoundError(f"{asked}; this server has: {known}")
        queues = self._queues[name]
        serving = [queue for queue in queues if queue.ready] or queues
        # A queue that is not fully loaded may still fail to load, and is used only if no other serves.
        return next((queue for queue in reversed(serving) if queue.loaded), serving[-1])


def _cache_key(queue: ModelQueue, request: GenerationRequest) -> ResponseKey | None:
    """None if the model has no response cache, or no ready instance to tell which engines would draw."""
    instances = _status(queue).instances
    return response_key(request, instances[0], queue) if queue.config.response_cache and instances else None


def _status(queue: ModelQueue) -> ModelStatus:
    instances = tuple(w.info for w in queue.workers if w.info is not None and w.state is WorkerState.READY)
    return ModelStatus(queue.config, instances, ready=queue.ready, reason="" if queue.ready else queue.reason)
