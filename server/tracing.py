"""Traces of requests: which ones are traced, where their time went, and handing that to a writer."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from server.requests import Completed, Event, Image, Progress, Started
from server.settings import TraceMode, TraceSettings
from server.statistics import RequestRecord
from server.tensors import Parameter, Tensor

log = logging.getLogger(__name__)

PARENT = "traceparent"  # the header of W3C Trace Context that names the caller's span
CONTEXT_HEADERS = (PARENT, "tracestate")
BACKLOG = 64 * 1024**2  # bytes of traces that may wait to be written; further ones are dropped
TRACE_BYTES = 16 * 1024  # what a trace counts for besides its tensors: its stages, one per step among them
CLOSE_WITHIN = 5.0  # seconds for what waits to be written when the server stops


@dataclass(frozen=True)
class Call:
    """The gRPC call that brought a request: service/method, and the trace context in its metadata."""

    method: str
    context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Something that took its time; nanoseconds of the monotonic clock."""

    name: str
    began: int
    ended: int
    attributes: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(kw_only=True)
class Trace:
    """One traced request, filled in by the components that work on it."""

    id: int
    model: str
    version: str
    request_id: str
    settings: TraceSettings
    call: Call
    began: int = field(default_factory=time.monotonic_ns)
    answered: int = 0  # when the last response was ready
    ended: int = 0  # when the call had ended
    error: str = ""
    record: RequestRecord | None = None
    stages: list[Stage] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    _worked_since: int = 0  # when a worker began
    _waited_since: int = 0  # when the last event came

    @property
    def size(self) -> int:
        """Bytes that it keeps, roughly."""
        return TRACE_BYTES + sum(len(tensor.data) for tensor in (*self.inputs, *self.outputs))

    def keep(self, *, inputs: Iterable[Tensor] = (), outputs: Iterable[Tensor] = ()) -> None:
        """Takes in tensors, if they are to be recorded."""
        if self.settings.tensors:
            self.inputs += inputs
            self.outputs += outputs

    def observe(self, record: RequestRecord) -> None:
        """Takes in what the model noted about the request."""
        self.record = record

    def see(self, event: Event) -> None:
        """Takes in an event of an image. The worker says how long its stages took; when they ended is measured here."""
        now = time.monotonic_ns()
        match event:
            case Started(instance, attempt):
                self._add("queue", self._waited_since or self.began, now, instance=instance, attempt=attempt)
                self._worked_since = now
            case Progress(step, of, index, step_ms, batch_size):
                about = {"step": step, "of": of, "image_index": index, "batch_size": batch_size}
                self._add("step", now - _ns(step_ms), now, **about)
            case Image(index) if self._worked_since:  # one from the response cache carries the times of an old run
                encoding = now - _ns(event.image_encode_ms)
                self._add("decode", encoding - _ns(event.decode_ms), encoding, image_index=index)
                self._add("encode_image", encoding, now, image_index=index, format=str(event.format))
            case Completed(timings) if self._worked_since and timings.encode_ms:
                self._add("encode", self._worked_since, self._worked_since + _ns(timings.encode_ms))
        self._waited_since = now

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Covers the sending of a response."""
        began = time.monotonic_ns()
        try:
            yield
        finally:
            self._add("send", began, time.monotonic_ns())

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Covers the answering of the request; an exception is recorded as its error."""
        try:
            yield
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.answered = time.monotonic_ns()

    def end(self) -> None:
        """Marks the call as ended. With a single response, its sending is the time since the answer."""
        self.ended = time.monotonic_ns()
        self.answered = self.answered or self.ended
        if not self.error and not any(s.name == "send" for s in self.stages):
            self._add("send", self.answered, self.ended)

    def _add(self, name: str, began: int, ended: int, **attributes: Parameter) -> None:
        self.stages.append(Stage(name, began, ended, attributes))


class Tracer:
    """Chooses the requests to trace, and has their traces written by a thread of its own.

    A model has the global settings except for those set for it; `trace_count` is counted down where it was set.
    `lost` is called for each trace that is dropped or cannot be written, on the event loop or the writer's thread.
    """

    def __init__(
        self,
        settings: TraceSettings,
        write: Callable[[Trace], None],
        close: Callable[[], None],
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._start = self._global = settings
        self._own: dict[str, dict[str, Any]] = {}  # by model, the settings that are its own
        self._seen: Counter[str] = Counter()  # by model with settings of its own, "" for all others together
        self._made = 0
        self._write, self._close, self._lost = write, close, lost
        self._failing = False  # whether the last trace could not be written
        self._dropping = False  # whether one was dropped since the writer was last idle
        self._handed = self._written = 0  # bytes, by the event loop and by the writer; the difference is waiting
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trace")

    def settings(self, model: str = "") -> TraceSettings:
        """Those of `model`, or the global ones."""
        own = self._own.get(model)
        return replace(self._global, **own) if own else self._global

    def update(self, model: str, wanted: Mapping[str, list[str]]) -> TraceSettings:
        """Changes settings; see `TraceSettings.changed`. An empty list resets a model's to the global one."""
        if not model:
            self._global = self._global.changed(wanted, self._start)
        else:
            changed = self.settings(model).changed(wanted, self._global)
            own = self._own.get(model, {}) | {name: getattr(changed, name) for name in wanted}
            self._own[model] = {name: value for name, value in own.items() if wanted.get(name, True)}
        self._seen.pop(model, None)  # `trace_rate` counts from here
        return self.settings(model)

    def begin(self, model: str, version: str, request_id: str, call: Call) -> Trace | None:
        """A trace, if this request is one to be traced. The caller makes it current while the model runs."""
        settings = self.settings(model)
        if not (settings.active and (self._brings_context(settings, call) or self._is_due(model, settings))):
            return None
        self._made += 1
        return Trace(id=self._made, model=model, version=version, request_id=request_id, settings=settings, call=call)

    def end(self, trace: Trace | None) -> None:
        """Has the trace written, if there is one; drops it if too much is waiting to be."""
        if trace is None:
            return
        trace.end()
        size, waiting = trace.size, self._handed - self._written
        if waiting and waiting + size > BACKLOG:
            self._drop(waiting)
            return
        self._dropping = self._dropping and waiting > 0
        self._handed += size
        self._writer.submit(self._write_one, trace, size)

    async def close(self) -> None:
        """Returns when everything is written, or after `CLOSE_WITHIN`; what has not been started by then is dropped."""
        try:
            async with asyncio.timeout(CLOSE_WITHIN):
                await asyncio.wrap_future(self._writer.submit(self._close))
        except TimeoutError:
            log.warning("traces that were not written within %g s are lost", CLOSE_WITHIN)
        finally:
            self._writer.shutdown(wait=False, cancel_futures=True)

    def _drop(self, waiting: int) -> None:
        self._lost()
        if not self._dropping:
            log.error(
                "traces come faster than they are written: %d MiB wait, and what comes is lost until there is room",
                waiting // 1024**2,
            )
        self._dropping = True

    def _brings_context(self, settings: TraceSettings, call: Call) -> bool:
        """As in Triton, a request with a trace context is traced at any rate setting: its own sampler has decided."""
        return settings.trace_mode is TraceMode.OPENTELEMETRY and PARENT in call.context

    def _is_due(self, model: str, settings: TraceSettings) -> bool:
        if not settings.trace_count or not settings.trace_rate:
            return False
        counted = model if self._own.get(model) else ""
        self._seen[counted] += 1
        if (self._seen[counted] - 1) % settings.trace_rate:
            return False
        if settings.trace_count > 0:
            self._count_down(model, settings.trace_count - 1)
        return True

    def _count_down(self, model: str, left: int) -> None:
        if "trace_count" in self._own.get(model, {}):
            self._own[model]["trace_count"] = left
        else:
            self._global = replace(self._global, trace_count=left)

    def _write_one(self, trace: Trace, size: int) -> None:
        """Runs on the writer's thread, whose errors nobody would see: the first in a row is logged."""
        try:
            self._write(trace)
        except Exception as error:  # noqa: BLE001 - the thread's boundary: no request depends on a trace
            self._lost()
            if not self._failing:
                log.error("traces cannot be written, and are lost until they can be: %s", error)
            self._failing = True
        else:
            self._failing = False
        finally:
            self._written += size


def trace_context(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """The headers of W3C Trace Context among a call's metadata."""
    return {key: str(value) for key, value in metadata or () if key in CONTEXT_HEADERS}


def _ns(milliseconds: float) -> int:
    return int(1e6 * milliseconds)
