"""Traces as OpenTelemetry spans, created once a request has ended from what was recorded along the way.

The only module that knows OpenTelemetry, which is an optional extra.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from server.errors import ConfigError
from server.settings import TelemetryConfig
from server.tracing import CLOSE_WITHIN, Stage, Trace

log = logging.getLogger(__name__)

INSTALL = "pip install 'zserve[tracing]'"
LIBRARY_LOG = logging.getLogger("opentelemetry")  # says why a batch cannot be sent, in several lines for every batch


class Telemetry:
    """Sends traces to a collector over OTLP/HTTP, or to `exporter`; `lost` is told how many were lost."""

    def __init__(
        self, config: TelemetryConfig, exporter: Any = None, lost: Callable[[int], object] = lambda traces: None
    ) -> None:
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
        except ImportError as error:
            raise ConfigError(
                f"trace mode opentelemetry needs packages that are not here ({error}): {INSTALL}"
            ) from None
        self._api, self._extract = trace, propagate.extract
        self._provider = TracerProvider(resource=Resource.create(dict(config.resource)), shutdown_on_exit=False)
        self._outbox = _Outbox(exporter or OTLPSpanExporter(endpoint=config.url), SpanExportResult, lost)
        processor = BatchSpanProcessor(
            self._outbox,
            max_queue_size=config.max_queue_size,
            schedule_delay_millis=config.schedule_delay,
            max_export_batch_size=config.max_export_batch_size,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("zserve")

    def write(self, trace: Trace) -> None:
        """Creates the spans of `trace`: one for the call, below the caller's if it named one, and one per stage."""
        api = self._api
        shift = time.time_ns() - time.monotonic_ns()
        call = self._tracer.start_span(
            trace.call.method,
            context=self._extract(trace.call.context),
            kind=api.SpanKind.SERVER,
            attributes=_attributes(trace),
            start_time=trace.began + shift,
        )
        inside = api.set_span_in_context(call)
        for stage in stages(trace):
            span = self._tracer.start_span(
                stage.name, context=inside, attributes=dict(stage.attributes), start_time=stage.began + shift
            )
            span.end(stage.ended + shift)
        if trace.error:
            call.set_status(api.Status(api.StatusCode.ERROR, trace.error))
        self._outbox.expect(call.get_span_context())
        call.end(trace.ended + shift)

    def close(self) -> None:
        """Exports the remaining spans and shuts down; gives up after `CLOSE_WITHIN`."""
        # By itself OpenTelemetry tries for 30 s to reach a collector that is not there, and the process waits for it.
        giving_up = threading.Timer(CLOSE_WITHIN, self._outbox.shutdown)
        giving_up.start()
        try:
            self._provider.shutdown()
        finally:
            giving_up.cancel()
            LIBRARY_LOG.setLevel(logging.NOTSET)


class _Outbox:
    """An exporter that counts the traces it loses, and logs the first loss in a row, with OpenTelemetry's own reason.

    A trace is known by the span of its call, which ends last. These spans come in the order in which they ended; one
    that another overtakes was dropped by OpenTelemetry, which drops the oldest span where its queue is full.
    """

    def __init__(self, exporter: Any, results: Any, lost: Callable[[int], object]) -> None:
        self._exporter, self._results, self._lost = exporter, results, lost
        self._expected: deque[int] = deque()  # IDs of the spans of calls, in the order in which these end
        self._failing = False

    def expect(self, call: Any) -> None:
        """The span with the context `call` is about to end; it is not exported if the caller chose not to sample it."""
        if call.trace_flags.sampled:
            self._expected.append(call.span_id)

    def export(self, spans: Sequence[Any]) -> Any:
        """See OpenTelemetry's `SpanExporter`."""
        calls = [span.context.span_id for span in spans if span.kind.name == "SERVER"]
        for call in calls:
            while self._expected and self._expected.popleft() != call:
                self._lost(1)
        try:
            result, reason = self._exporter.export(spans), "the lines before say why"
        except Exception as error:  # noqa: BLE001 - exporters of older versions raise what others report
            result, reason = self._results.FAILURE, str(error)
        failed = result is not self._results.SUCCESS
        self._lost(len(calls) if failed else 0)
        self._note(failed, reason)
        return result

    def shutdown(self) -> None:
        """See OpenTelemetry's `SpanExporter`."""
        self._exporter.shutdown()

    def _note(self, failed: bool, reason: str) -> None:
        if failed is self._failing:
            return
        self._failing = failed
        if failed:
            log.error("traces cannot be sent, and are lost until they can be: %s", reason)
        else:
            log.info("traces can be sent again")
        LIBRARY_LOG.setLevel(logging.CRITICAL if failed else logging.NOTSET)


def stages(trace: Trace) -> list[Stage]:
    """An image request's own stages; any other request also has the two known from its model's statistics."""
    record = trace.record
    if record is None or any(s.name == "queue" for s in trace.stages) or record.cached:
        return trace.stages
    began, spent = record.began + record.spent.queue, record.spent
    compute = spent.compute_input + spent.compute_infer + spent.compute_output
    return [Stage("queue", record.began, began), Stage("compute", began, began + compute), *trace.stages]


def _attributes(trace: Trace) -> dict[str, str]:
    service, _, method = trace.call.method.partition("/")
    found = {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": method,
        "triton.model_name": trace.model,
        "triton.model_version": trace.version,
        "triton.request_id": trace.request_id,
    }
    return {name: value for name, value in found.items() if value}
