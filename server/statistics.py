"""What Triton's statistics say about one version of a model: counts and nanoseconds since it was loaded."""

import asyncio
import bisect
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from server.errors import (
    DeviceMemoryError,
    EngineError,
    PoisonRequestError,
    QueueFullError,
    QueueTimeoutError,
    WorkerLostError,
    ZServeError,
)
from server.requests import Event

SUMMARY_WINDOW = 1024  # latest requests that a summary's quantiles cover
FIRST_RESPONSE_MS = (100, 500, 2000, 5000)  # Triton's buckets


class FailureReason(StrEnum):
    """Why a request failed, in the words of `nv_inference_request_failure`."""

    REJECTED = "REJECTED"
    CANCELED = "CANCELED"
    BACKEND = "BACKEND"
    OTHER = "OTHER"


@dataclass
class Duration:
    """How often something happened, and how long it took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Once more."""
        self.count += 1
        self.ns += ns


@dataclass
class Summary(Duration):
    """A `Duration` that also keeps the latest values, for quantiles."""

    recent: deque[int] = field(default_factory=lambda: deque(maxlen=SUMMARY_WINDOW))

    def add(self, ns: int) -> None:
        """Once more."""
        super().add(ns)
        self.recent.append(ns)


@dataclass
class Histogram:
    """Milliseconds by the buckets of `FIRST_RESPONSE_MS`, and one for longer times."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(FIRST_RESPONSE_MS) + 1))
    total_ms: float = 0.0

    def add(self, ns: int) -> None:
        """Once more."""
        self.counts[bisect.bisect_left(FIRST_RESPONSE_MS, ns / 1e6)] += 1
        self.total_ms += ns / 1e6


@dataclass(frozen=True)
class Spent:
    """Nanoseconds of one request by stage."""

    queue: int = 0
    compute_input: int = 0
    compute_infer: int = 0
    compute_output: int = 0


STAGES = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass
class BatchStatistics:
    """Executions of one batch size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass
class RequestRecord:
    """What a model notes about a request while it answers it."""

    spent: Spent = field(default_factory=Spent)
    inferences: int = 1  # rows of the request
    cached: bool = False  # the answer came from the response cache: nothing was inferred
    succeeded: bool = False  # its answer is complete, even if nobody reads it to the end
    first_response: int | None = None  # ns from arrival
    began: int = field(default_factory=time.monotonic_ns)

    def responded(self) -> None:
        """A response is about to go out."""
        if self.first_response is None:
            self.first_response = time.monotonic_ns() - self.began


class Observer(Protocol):
    """Follows one request."""

    def see(self, event: Event) -> None:
        """Something has happened to an image."""

    def observe(self, record: RequestRecord) -> None:
        """The model is done with the request, however it ended."""


OBSERVER: ContextVar[Observer | None] = ContextVar("observer", default=None)  # of the current context's request


class Statistics:
    """The figures of one version of a model."""

    def __init__(self) -> None:
        self.last_inference_ms = 0  # since 1970
        self.inference_count = 0
        self.execution_count = 0
        self.under_way = 0  # requests not fully answered yet
        self.pending = 0  # of those, the ones that wait to be executed; counted by whatever queues them
        self._idle = asyncio.Event()
        self._idle.set()
        self.load_seconds = 0.0
        self.success, self.fail = Summary(), Duration()
        self.stages = {stage: Summary() for stage in STAGES}
        self.first_responses = Histogram()
        self.cache_hit, self.cache_miss = Summary(), Summary()  # lookups; for a miss also storing the answer
        self.batches: dict[int, BatchStatistics] = {}
        self.failures = dict.fromkeys(FailureReason, 0)

    @contextmanager
    def request(self) -> Iterator[RequestRecord]:
        """Follows one request, and counts how it ended."""
        record = RequestRecord()
        self.under_way += 1
        self._idle.clear()
        try:
            yield record
        except BaseException as error:
            if record.succeeded and isinstance(error, GeneratorExit | asyncio.CancelledError):
                self._succeeded(record)
            else:
                self._failed(record, failure_reason(error))
            raise
        else:
            self._succeeded(record)
        finally:
            self.under_way -= 1
            if not self.under_way:
                self._idle.set()
            observer = OBSERVER.get()
            if observer is not None:
                observer.observe(record)

    async def idle(self) -> None:
        """Returns once no request is under way."""
        await self._idle.wait()

    def executed(self, batch_size: int, spent: Spent) -> None:
        """The backend ran once, for `batch_size` rows."""
        self.execution_count += 1
        batch = self.batches.setdefault(batch_size, BatchStatistics())
        batch.compute_input.add(spent.compute_input)
        batch.compute_infer.add(spent.compute_infer)
        batch.compute_output.add(spent.compute_output)

    def _succeeded(self, record: RequestRecord) -> None:
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.inference_count += 0 if record.cached else record.inferences
        self.success.add(time.monotonic_ns() - record.began)
        for stage in STAGES[:1] if record.cached else STAGES:
            self.stages[stage].add(getattr(record.spent, stage))
        if record.first_response is not None:
            self.first_responses.add(record.first_response)

    def _failed(self, record: RequestRecord, reason: FailureReason) -> None:
        self.failures[reason] += 1
        self.fail.add(time.monotonic_ns() - record.began)


def failure_reason(error: BaseException) -> FailureReason:
    """The label under which `error` is counted."""
    match error:
        case GeneratorExit() | asyncio.CancelledError():
            return FailureReason.CANCELED
        case QueueFullError() | QueueTimeoutError():
            return FailureReason.REJECTED
        case EngineError() | DeviceMemoryError() | WorkerLostError() | PoisonRequestError():
            return FailureReason.BACKEND
        case ZServeError():
            return FailureReason.OTHER
        case _:
            return FailureReason.BACKEND
