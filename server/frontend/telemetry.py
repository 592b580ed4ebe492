"""Traces as OpenTelemetry spans, created once a request has ended from what was recorded along the way.

The only module that knows OpenTelemetry, which is an optional extra.
"""

import threading
import time
from typing import Any

from server.errors import ConfigError
from server.settings import TelemetryConfig
from server.tracing import CLOSE_WITHIN, Stage, Trace

INSTALL = "pip install 'zserve[tracing]'"


class Telemetry:
    """Sends traces to a collector over OTLP/HTTP, or to `exporter`."""

    def __init__(self, config: TelemetryConfig, exporter: Any = None) -> None:
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"trace mode opentelemetry needs packages that are not here ({error}): {INSTALL}"
            ) from None
        self._api, self._extract = trace, propagate.extract
        self._provider = TracerProvider(resource=Resource.create(dict(config.resource)), shutdown_on_exit=False)
        self._exporter = exporter or OTLPSpanExporter(endpoint=config.url)
        processor = BatchSpanProcessor(
            self._exporter,
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
        call.end(trace.ended + shift)

    def close(self) -> None:
        """Exports the remaining spans and shuts down; gives up after `CLOSE_WITHIN`."""
        # By itself OpenTelemetry tries for 30 s to reach a collector that is not there, and the process waits for it.
        giving_up = threading.Timer(CLOSE_WITHIN, self._exporter.shutdown)
        giving_up.start()
        try:
            self._provider.shutdown()
        finally:
            giving_up.cancel()


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
