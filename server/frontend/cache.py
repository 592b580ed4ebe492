"""Triton's response cache: the answer to a request that has been answered before, while there is room for it."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

from server.requests import Completed, EngineUse, GenerationRequest, Image, InstanceInfo

Answer = tuple[Image | Completed, ...]


class ResponseCache:
    """The most recently used answers, at most `capacity` bytes of images."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._answers: OrderedDict[Hashable, Answer] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable) -> Answer | None:
        """The answer to `key`'s request, if it is kept; its `Completed` says where it came from."""
        answer = self._answers.get(key)
        if answer is None:
            return None
        self._answers.move_to_end(key)
        return tuple(replace(e, response_cached=True) if isinstance(e, Completed) else e for e in answer)

    def put(self, key: Hashable, answer: Answer) -> None:
        """Keeps `answer`, dropping the least recently used ones when there is too much."""
        if key in self._answers:
            return
        self._answers[key] = answer
        self._bytes += _size(answer)
        while self._bytes > self._capacity:
            _, dropped = self._answers.popitem(last=False)
            self._bytes -= _size(dropped)


def response_key(request: GenerationRequest, instance: InstanceInfo) -> Hashable:
    """Everything an image's bytes depend on: the request but for when and for whom, and the engines that draw it."""
    drawn = replace(request, request_id="", priority=0, timeout=None, queue_timeout=None, preview_interval=0)
    return drawn, instance.version, instance.precision, _backends(instance.engines)


def _backends(engines: tuple[EngineUse, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((use.component, use.backend) for use in engines)


def _size(answer: Answer) -> int:
    return sum(len(event.data) for event in answer if isinstance(event, Image))
