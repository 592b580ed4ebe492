"""Triton's response cache: repeated requests get the answer they got before, while there is room to keep it."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace

from server.requests import Completed, EngineUse, GenerationRequest, Image, InstanceInfo

Answer = tuple[Image | Completed, ...]
ENTRY_BYTES = 1024  # what an entry takes besides the images: its key, which is a digest, and the events


@dataclass(frozen=True)
class ResponseKey:
    """What a request's images depend on. `model` is one load of a version: another may bring other weights."""

    model: object
    digest: bytes


class ResponseCache:
    """The most recently used answers, at most `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._answers: OrderedDict[ResponseKey, Answer] = OrderedDict()
        self._bytes = 0

    def get(self, key: ResponseKey) -> Answer | None:
        """The answer to `key`'s request, if it is kept; its `Completed` says where it came from."""
        answer = self._answers.get(key)
        if answer is None:
            return None
        self._answers.move_to_end(key)
        return tuple(replace(e, response_cached=True) if isinstance(e, Completed) else e for e in answer)

    def put(self, key: ResponseKey, answer: Answer) -> None:
        """Keeps `answer`, evicting the least recently used ones to make room; not one over the capacity."""
        size = _size(answer)
        if key in self._answers or size > self._capacity:
            return
        while self._bytes + size > self._capacity:
            self._drop(next(iter(self._answers)))
        self._answers[key] = answer
        self._bytes += size

    def forget(self, model: object) -> None:
        """Drops all answers of a model that is unloaded."""
        for key in [key for key in self._answers if key.model is model]:
            self._drop(key)

    def _drop(self, key: ResponseKey) -> None:
        self._bytes -= _size(self._answers.pop(key))


def response_key(request: GenerationRequest, instance: InstanceInfo, model: object) -> ResponseKey:
    """Everything an image's bytes depend on: the request without timing, id, priority or previews, and the engines."""
    when = replace(request, timeout=None, queue_timeout=None, waited=0.0, delayed=False)
    drawn = replace(when, request_id="", priority=0, preview_interval=0)
    parts = (drawn, _backends(instance.engines))
    return ResponseKey(model, hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).digest())


def _backends(engines: tuple[EngineUse, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((str(use.component), str(use.backend)) for use in engines)


def _size(answer: Answer) -> int:
    return ENTRY_BYTES + sum(len(event.data) for event in answer if isinstance(event, Image))
