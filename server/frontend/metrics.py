"""Prometheus metrics, on their own port. Fed by the events that pass through the dispatcher."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.errors import ZServeError
from server.frontend import exposition
from server.frontend.queue import ModelQueue
from server.frontend.workers import WorkerState
from server.requests import Completed, Event, Image, Preview, Progress, Queued, Started, Timings
from server.statistics import OBSERVER, RequestRecord, Spent

log = logging.getLogger(__name__)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
STEP_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)

BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32)

# How a request that has reached a queue can end.
OUTCOMES = ("ok", "cancelled", "invalid_argument", "resource_exhausted", "deadline_exceeded", "unavailable", "internal")
LOOKUPS = ("hit", "miss")
MOST_REASON = 240  # characters of a reason in a label: paths come before what is wrong with them


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "zserve_requests",
            "Requests that reached a queue, by how they ended: ok, cancelled, or their gRPC status",
            "outcome",
        )
        self.duration = self._histogram(
            "zserve_request_duration_seconds",
            "Arrival until the client has taken the last event, of requests that succeeded",
            SECONDS,
        )
        self.stages = self._histogram(
            "zserve_stage_duration_seconds",
            "Time of one request in a stage: queue, encode, denoise, decode, image_encode",
            SECONDS,
            "stage",
        )
        self.steps = self._histogram(
            "zserve_step_duration_seconds", "Time of one denoiser step, however many images shared it", STEP_SECONDS
        )
        self.batches = self._histogram("zserve_batch_size", "Images that shared a denoiser step", BATCH_SIZES)
        self.images = self._counter("zserve_images", "Images sent")
        self.previews = self._counter("zserve_previews", "Previews sent")
        self.prompt_cache = self._counter(
            "zserve_prompt_cache_lookups", "Requests whose prompt's encoding was there (hit) or not (miss)", "result"
        )
        self.response_cache = self._counter(
            "zserve_response_cache_lookups", "Requests answered from the response cache (hit) or not (miss)", "result"
        )
        self.retries = self._counter("zserve_request_retries", "Requests started over because their worker was lost")
        self.poisoned = self._counter("zserve_poison_requests", "Requests refused because they ended two workers")
        self.fallbacks = self._counter(
            "zserve_engine_fallback",
            "Requests that a component served on a fallback engine",
            *("component", "backend", "reason"),
        )

        self.traces_lost = Counter(
            "zserve_traces_lost",
            "Traces that could not be written or sent, or were dropped as they came faster than that",
            registry=self.registry,
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, ("model", *labels), buckets=buckets, registry=self.registry)

    def serve(self, address: str, port: int) -> Callable[[], None]:
        """Answers /metrics from a thread of its own; the returned function stops it."""
        bound, stop = exposition.serve(self.registry, address, port)
        log.info("metrics on %s:%d", address, bound)
        return stop

    def watch(self, queues: Callable[[], Iterable[ModelQueue]], readiness: Callable[[], Mapping[str, bool]]) -> None:
        """Also reports the queues, their workers and which models are ready, as of each scrape."""
        self.registry.register(_StateCollector(queues, readiness))

    def expect(self, queue: ModelQueue) -> None:
        """Shows the counters of a model at 0: Prometheus sees no increase in one that appears with its first event."""
        model = queue.config.name
        for counter in (self.images, self.previews, self.retries, self.poisoned):
            counter.labels(model)
        for outcome in OUTCOMES:
            self.requests.labels(model, outcome)
        for result in LOOKUPS:
            self.prompt_cache.labels(model, result)
            if queue.config.response_cache:
                self.response_cache.labels(model, result)

    @contextmanager
    def request(self, queue: ModelQueue) -> Iterator["GenerationRecord"]:
        """Follows one request and counts how it ended."""
        record = GenerationRecord(self, queue)
        try:
            with queue.statistics.request() as counted:
                record.counted = counted
                yield record
        except (asyncio.CancelledError, GeneratorExit):
            record.end("ok" if record.completed else "cancelled")
            raise
        except ZServeError as error:
            record.end(error.status.name.lower())
            raise
        except Exception:
            record.end("internal")
            raise
        record.end("ok")


class GenerationRecord:
    """One request's way through the metrics."""

    def __init__(self, metrics: Metrics, queue: ModelQueue) -> None:
        self.completed = False
        self.counted = RequestRecord()
        self._metrics, self._model, self._statistics = metrics, queue.config.name, queue.statistics
        self._began = time.monotonic()
        self._waiting = False
        self._wait(waiting=True)

    def see(self, event: Event) -> None:
        """Takes in an event of the request."""
        observer = OBSERVER.get()
        if observer is not None:
            observer.see(event)
        match event:
            case Queued():  # again, if its worker was lost
                self._wait(waiting=True)
            case Started():
                self._wait(waiting=False)
            case Progress(batch_index=0):  # the first of the images that shared the step stands for all
                self._metrics.steps.labels(self._model).observe(event.step_ms / 1e3)
                self._metrics.batches.labels(self._model).observe(event.batch_size)
            case Preview():
                self._metrics.previews.labels(self._model).inc()
            case Image():
                self._metrics.images.labels(self._model).inc()
                self.counted.responded()
            case Completed():
                self._see_completed(event)

    def end(self, outcome: str) -> None:
        """Records that the request has ended."""
        self._wait(waiting=False)
        self._metrics.requests.labels(self._model, outcome).inc()
        if outcome == "ok":
            self._metrics.duration.labels(self._model).observe(time.monotonic() - self._began)

    def _wait(self, *, waiting: bool) -> None:
        """Records whether it waits for a worker to start it."""
        self._statistics.pending += waiting - self._waiting
        self._waiting = waiting

    def _see_completed(self, event: Completed) -> None:
        self.completed = self.counted.succeeded = True
        if event.response_cached:
            self.counted.cached = True
            return
        self.counted.spent = _spent(event.timings)
        self._statistics.executed(1, self.counted.spent)
        metrics, model, timings = self._metrics, self._model, event.timings
        for stage in ("queue", "encode", "denoise", "decode", "image_encode"):
            metrics.stages.labels(model, stage).observe(getattr(timings, f"{stage}_ms") / 1e3)
        metrics.prompt_cache.labels(model, "hit" if event.prompt_cached else "miss").inc()
        for use in event.engines:
            if use.fallback_reason:
                reason = use.fallback_reason[:MOST_REASON]
                metrics.fallbacks.labels(model, use.component, use.backend, reason).inc()


def _spent(timings: Timings) -> Spent:
    """The stages of an image under Triton's names: encoding the image file is `compute_output`."""
    infer = timings.encode_ms + timings.denoise_ms + timings.decode_ms
    return Spent(
        queue=int(1e6 * timings.queue_ms),
        compute_infer=int(1e6 * infer),
        compute_output=int(1e6 * timings.image_encode_ms),
    )


class _StateCollector(Collector):
    """Reads the state at the moment of the scrape, so nothing has to be kept in sync with it."""

    def __init__(self, queues: Callable[[], Iterable[ModelQueue]], readiness: Callable[[], Mapping[str, bool]]) -> None:
        self._queues, self._readiness = queues, readiness

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield self._models()
        yield from self._workers()

    def _models(self) -> Metric:
        ready = GaugeMetricFamily("zserve_model_ready", "1 when all of the model serves that is to", labels=["model"])
        for name, value in self._readiness().items():
            ready.add_metric([name], float(value))
        return ready

    def _workers(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily(
            "zserve_queue_depth", "Requests waiting for a worker", labels=["model", "version", "priority"]
        )
        running = GaugeMetricFamily("zserve_running_requests", "Requests a worker has", labels=["model", "version"])
        ready = GaugeMetricFamily(
            "zserve_worker_ready", "1 when the worker serves", labels=["model", "version", "worker"]
        )
        restarts = CounterMetricFamily(
            "zserve_worker_restarts", "Times the worker was replaced", labels=["model", "version", "worker"]
        )
        engines = GaugeMetricFamily(
            "zserve_engine_info",
            "The engine in use of each component; fallback_reason is empty where it is the one asked for",
            labels=["model", "version", "worker", "component", "backend", "fallback_reason"],
        )
        memory = GaugeMetricFamily(
            "zserve_worker_memory_bytes", "Worker memory by stage", labels=["model", "version", "worker", "stage"]
        )
        for queue in self._shown():
            version = [queue.config.name, queue.version]
            for priority, depth in queue.depths.items():
                waiting.add_metric([*version, str(priority)], depth)
            running.add_metric(version, queue.running)
            for worker in queue.workers:
                labels = [*version, worker.config.instance]
                ready.add_metric(labels, float(worker.state is WorkerState.READY))
                restarts.add_metric(labels, worker.restarts)
                if worker.info is not None:
                    for use in worker.info.engines:
                        engines.add_metric([*labels, use.component, use.backend, use.fallback_reason[:MOST_REASON]], 1)
                    for stage, size in vars(worker.info.memory).items():
                        memory.add_metric([*labels, stage], size)
        yield from (waiting, running, ready, restarts, engines, memory)

    def _shown(self) -> Iterable[ModelQueue]:
        """One queue per version; while a version is being reloaded with another config, the old one."""
        shown: dict[tuple[str, str], ModelQueue] = {}
        for queue in list(self._queues()):
            key = (queue.config.name, queue.version)
            if key not in shown or queue.loaded:
                shown[key] = queue
        return shown.values()
