"""Traces: which requests get one, what it holds, and the OpenTelemetry spans it becomes."""

import asyncio
import json
import logging
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server import tracing
from server.cli import parser, read_config
from server.errors import ConfigError
from server.frontend import telemetry
from server.frontend.trace_file import append_trace
from server.requests import Completed, Event, Image, ImageFormat, Progress, Queued, Started, Timings
from server.settings import TelemetryConfig, TraceLevel, TraceMode, TraceSettings
from server.statistics import RequestRecord, Spent
from server.tensors import DataType, Tensor, join_strings
from server.tracing import TRACE_BYTES, Call, Stage, Trace, Tracer, trace_context

ON = TraceSettings(trace_level=frozenset({TraceLevel.TIMESTAMPS}), trace_rate=1, trace_mode=TraceMode.OPENTELEMETRY)
TENSORS = TraceSettings(frozenset({TraceLevel.TENSORS}), trace_rate=1, trace_file="x")
PATIENCE = 300.0  # seconds that nothing here takes
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
IMAGE = Image(0, 7, 64, 64, ImageFormat.PNG, b"", decode_ms=20.0, image_encode_ms=10.0)
DRAWN: tuple[Event, ...] = (
    Queued(1),
    Started("w0"),
    Progress(1, 2, 0, step_ms=30.0, batch_size=2),
    Progress(2, 2, 0, step_ms=40.0),
    IMAGE,
    Completed(Timings(encode_ms=5.0), (), prompt_cached=False, denoiser_forwards=2),
)


SPENT = Spent(queue=4_000_000, compute_input=1_000_000, compute_infer=2_000_000, compute_output=3_000_000)


def a_trace(*events: Event, **call: str) -> Trace:
    made = Trace(id=1, model="demo", version="1", request_id="r", settings=ON, call=Call("service/Generate", call))
    for event in events:
        made.see(event)
    return made


def milliseconds(trace: Trace) -> dict[str, float]:
    return {s.name: (s.ended - s.began) / 1e6 for s in trace.stages}


def test_the_stages_of_an_image_have_the_lengths_that_the_worker_measured() -> None:
    trace = a_trace(*DRAWN)
    trace.end()
    assert [s.name for s in trace.stages] == ["queue", "step", "step", "decode", "encode_image", "encode", "send"]
    found = milliseconds(trace)
    assert (found["step"], found["decode"], found["encode_image"], found["encode"]) == (40.0, 20.0, 10.0, 5.0)
    assert trace.stages[3].ended == trace.stages[4].began
    assert trace.stages[1].attributes == {"step": 1, "of": 2, "image_index": 0, "batch_size": 2}


def test_every_attempt_waits_anew() -> None:
    queues = [s for s in a_trace(Started("w0"), Progress(1, 2, 0), Started("w1", 2)).stages if s.name == "queue"]
    assert [q.attributes["attempt"] for q in queues] == [1, 2]
    assert queues[1].began >= queues[0].ended


def test_who_is_begun_with_at_once_has_waited_since_the_call_came() -> None:
    trace = a_trace(Started("w0"))
    assert trace.stages[0].began == trace.began


def test_an_answer_from_the_cache_does_not_bring_its_old_stages() -> None:
    assert a_trace(IMAGE, replace(DRAWN[-1], response_cached=True)).stages == []  # type: ignore[type-var]


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError("gone")])
def test_a_call_that_fails_or_is_cancelled_has_that_as_its_error_and_sends_no_answer(error: BaseException) -> None:
    trace = a_trace()
    with pytest.raises(type(error)), trace.answering():
        raise error
    trace.end()
    assert trace.error == f"{type(error).__name__}: {error}"
    assert trace.began <= trace.answered <= trace.ended
    assert trace.stages == []


def test_a_response_that_is_not_sent_to_its_end_has_taken_its_time_too() -> None:
    trace = a_trace()
    with pytest.raises(asyncio.CancelledError), trace.answering(), trace.sending():
        raise asyncio.CancelledError
    assert [s.name for s in trace.stages] == ["send"]


def test_an_answer_is_sent_from_when_it_was_ready_to_the_end_of_the_call() -> None:
    trace = a_trace()
    with trace.answering():
        pass
    ready = trace.answered
    trace.end()
    (send,) = trace.stages
    assert trace.began <= ready == send.began <= send.ended == trace.ended


def test_a_call_that_ends_unanswered_is_over_when_it_ends() -> None:
    trace = a_trace()
    trace.end()
    assert trace.answered == trace.ended >= trace.began


def test_of_a_calls_metadata_the_trace_context_alone_is_kept() -> None:
    context = {"traceparent": PARENT, "tracestate": "vendor=1"}
    assert trace_context((*context.items(), ("authorization", "secret"))) == context
    assert trace_context(None) == {}


def traced(settings: TraceSettings, *calls: Call) -> list[bool]:
    tracer = Tracer(settings, lambda trace: None, lambda: None)
    return [tracer.begin("m", "1", "", call) is not None for call in calls]


def test_one_request_in_rate_is_traced_and_count_in_all() -> None:
    plain = [Call("m")] * 6
    assert traced(replace(ON, trace_rate=2, trace_count=2), *plain) == [True, False, True, False, False, False]
    assert not any(traced(replace(ON, trace_level=frozenset()), *plain))


def test_who_brings_a_trace_context_does_not_use_up_the_rate_or_the_count_of_the_others() -> None:
    brought, plain = Call("m", {"traceparent": PARENT}), Call("m")
    settings = replace(ON, trace_rate=2, trace_count=1)
    assert traced(settings, brought, plain, brought, plain) == [True, True, True, False]


def made(tracer: Tracer, calls: int, model: str = "m") -> list[bool]:
    return [tracer.begin(model, "1", "", Call("m")) is not None for _ in range(calls)]


def test_a_count_is_what_is_left_since_it_was_set() -> None:
    tracer = Tracer(replace(ON, trace_count=2), lambda trace: None, lambda: None)
    assert made(tracer, 3) == [True, True, False]
    assert tracer.settings("m").trace_count == 0
    assert tracer.update("", {"trace_count": ["1"]}).trace_count == 1
    assert made(tracer, 2) == [True, False]
    assert tracer.update("", {"trace_count": []}).trace_count == 2
    assert made(tracer, 3) == [True, True, False]


def test_a_rate_counts_from_when_it_was_set() -> None:
    tracer = Tracer(ON, lambda trace: None, lambda: None)
    tracer.update("m", {"trace_rate": ["2"]})
    assert made(tracer, 1) == [True]
    tracer.update("m", {"trace_rate": ["3"]})
    assert made(tracer, 4) == [True, False, False, True]


def test_a_models_count_is_its_own_and_the_others_is_theirs() -> None:
    tracer = Tracer(replace(ON, trace_count=1), lambda trace: None, lambda: None)
    tracer.update("m", {"trace_count": ["2"]})
    assert made(tracer, 3) == [True, True, False]
    assert made(tracer, 2, "other") == [True, False]
    tracer.update("m", {"trace_count": ["-1"]})
    assert all(made(tracer, 5))


def test_what_was_not_set_for_a_model_follows_what_is_set_for_all() -> None:
    tracer = Tracer(ON, lambda trace: None, lambda: None)
    tracer.update("m", {"trace_rate": ["5"]})
    tracer.update("", {"trace_level": ["TENSORS"], "trace_rate": ["3"]})
    assert tracer.settings("m") == replace(ON, trace_rate=5, trace_level=frozenset({TraceLevel.TENSORS}))
    assert tracer.update("m", {"trace_rate": []}).trace_rate == 3
    assert tracer.update("", {"trace_rate": ["2"]}).trace_rate == 2
    assert tracer.settings("m").trace_rate == 2


def test_requests_of_a_model_with_a_rate_of_its_own_are_counted_by_themselves() -> None:
    tracer = Tracer(replace(ON, trace_rate=2), lambda trace: None, lambda: None)
    tracer.update("m", {"trace_rate": ["3"]})
    seen = [(made(tracer, 1, "m"), made(tracer, 1, "other")) for _ in range(4)]
    assert [m for (m,), _ in seen] == [True, False, False, True]
    assert [other for _, (other,) in seen] == [True, False, True, False]


class FailingWriter:
    """Fails with each of `errors` in turn, or writes where that is None."""

    def __init__(self, *errors: Exception | None) -> None:
        self.written: list[int] = []
        self._errors = iter(errors)

    def __call__(self, trace: Trace) -> None:
        if (error := next(self._errors)) is not None:
            raise error
        self.written.append(trace.id)


async def test_traces_that_cannot_be_written_are_said_once_until_one_can_be(caplog: pytest.LogCaptureFixture) -> None:
    write, lost = FailingWriter(OSError("no space"), OSError("no space"), None, OSError("again")), list[None]()
    tracer = Tracer(ON, write, lambda: None, lambda: lost.append(None))
    end_traces(tracer, 4)
    await tracer.close()
    assert write.written == [3]
    assert len(lost) == 3
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == ["no space", "again"]


async def test_traces_that_could_not_be_written_are_not_waiting_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "BACKLOG", 2 * TRACE_BYTES)
    write = FailingWriter(OSError("no space"), OSError("no space"), None)
    tracer = Tracer(ON, write, lambda: None)
    end_traces(tracer, 2)
    await catch_up(tracer)
    end_traces(tracer, 1)
    await tracer.close()
    assert write.written == [3]


def end_traces(tracer: Tracer, count: int) -> None:
    for _ in range(count):
        tracer.end(tracer.begin("m", "1", "", Call("m")))


class HeldWriter:
    """Writes nothing until it is let go."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, trace: Trace) -> None:
        self.begun.set()
        self.go.wait(PATIENCE)
        self.written.append(trace.id)


async def catch_up(tracer: Tracer) -> None:
    """Waits until the writer has nothing to do."""
    await asyncio.wrap_future(tracer._writer.submit(lambda: None))


async def test_traces_that_come_faster_than_they_are_written_are_dropped_which_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "BACKLOG", 3 * TRACE_BYTES, raising=False)
    write, lost = HeldWriter(), list[None]()
    tracer = Tracer(ON, write, lambda: None, lambda: lost.append(None))
    end_traces(tracer, 6)
    write.go.set()
    await catch_up(tracer)
    end_traces(tracer, 1)
    await catch_up(tracer)
    write.go.clear()
    end_traces(tracer, 4)
    write.go.set()
    await tracer.close()
    assert write.written == [1, 2, 3, 7, 8, 9, 10]
    assert len(lost) == 4
    said = [r.getMessage().partition(":")[0] for r in caplog.records]
    assert said == 2 * ["traces come faster than they are written"], "once for each time that they did"


def end_a_trace_of(size: int, tracer: Tracer, *, of_what: str = "inputs") -> None:
    trace = tracer.begin("m", "1", "", Call("m"))
    assert trace is not None
    trace.keep(**{of_what: [Tensor("t", DataType.UINT8, (size,), bytes(size))]})
    tracer.end(trace)


@pytest.mark.parametrize("of_what", ["inputs", "outputs"])
async def test_tensors_count_for_what_may_wait_and_a_trace_of_any_size_is_written_where_none_does(of_what: str) -> None:
    write = HeldWriter()
    tracer = Tracer(TENSORS, write, lambda: None)
    for _ in range(2):
        end_a_trace_of(tracing.BACKLOG, tracer, of_what=of_what)
    write.go.set()
    await tracer.close()
    assert write.written == [1]


async def test_a_small_trace_that_still_fits_does_not_make_the_next_loss_a_new_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "BACKLOG", 4 * TRACE_BYTES)
    write = HeldWriter()
    tracer = Tracer(TENSORS, write, lambda: None)
    for size in (0, 3 * TRACE_BYTES, 0, 3 * TRACE_BYTES):
        end_a_trace_of(size, tracer)
    write.go.set()
    await tracer.close()
    assert write.written == [1, 3]
    assert len(caplog.records) == 1


async def test_the_event_loop_goes_on_while_the_last_traces_are_written() -> None:
    write, closed = HeldWriter(), threading.Event()
    tracer = Tracer(ON, write, closed.set)
    end_traces(tracer, 3)
    closing = asyncio.create_task(tracer.close())
    await asyncio.sleep(0)
    assert not write.written
    write.go.set()
    await closing
    assert write.written == [1, 2, 3]
    assert closed.is_set()


async def test_what_cannot_be_written_in_time_when_the_server_stops_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But for the one that is being written: half of it would spoil the file."""
    monkeypatch.setattr(tracing, "CLOSE_WITHIN", 0.01, raising=False)
    write = HeldWriter()
    tracer = Tracer(ON, write, lambda: None)
    end_traces(tracer, 3)
    await asyncio.to_thread(write.begun.wait, PATIENCE)
    await tracer.close()
    write.go.set()
    tracer._writer.shutdown()
    assert write.written == [1]
    assert "not written within 0.01 s" in caplog.text


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (TENSORS, True),
        (replace(TENSORS, trace_level=frozenset({TraceLevel.TIMESTAMPS})), False),
        (replace(TENSORS, trace_mode=TraceMode.OPENTELEMETRY), False),
    ],
)
def test_a_trace_keeps_tensors_only_where_they_are_told_of(settings: TraceSettings, kept: bool) -> None:
    tensor = Tensor("t", DataType.UINT8, (2,), b"ab")
    trace = Trace(id=1, model="m", version="1", request_id="", settings=settings, call=Call("m"))
    trace.keep(inputs=[tensor])
    trace.keep(outputs=[tensor])
    assert (trace.inputs, trace.outputs) == (([tensor], [tensor]) if kept else ([], []))


def test_who_brings_a_trace_context_is_traced_at_any_rate_by_opentelemetry_alone() -> None:
    calls = (Call("m"), Call("m", {"traceparent": PARENT}))
    assert traced(replace(ON, trace_rate=0), *calls) == [False, True]
    assert traced(replace(ON, trace_rate=0, trace_mode=TraceMode.TRITON, trace_file="x"), *calls) == [False, False]


def spans(trace: Trace) -> dict[str, ReadableSpan]:
    """What a collector gets to see of `trace`."""
    memory = InMemorySpanExporter()
    opened = telemetry.Telemetry(TelemetryConfig(resource=(("service.name", "test"),)), memory)
    trace.end()
    opened.write(trace)
    opened.close()
    return {s.name: s for s in memory.get_finished_spans()}


def test_spans_hang_below_the_callers() -> None:
    found = spans(a_trace(*DRAWN, traceparent=PARENT, tracestate="vendor=1"))
    call = found.pop("service/Generate")
    assert call.kind is otel.SpanKind.SERVER
    assert call.parent is not None
    assert (f"{call.parent.trace_id:032x}", f"{call.parent.span_id:016x}") == tuple(PARENT.split("-")[1:3])
    assert call.context.trace_state.to_header() == "vendor=1"
    assert set(found) == {"queue", "encode", "step", "decode", "encode_image", "send"}
    assert dict(found["queue"].attributes or {}) == {"instance": "w0", "attempt": 1}
    assert dict(found["encode_image"].attributes or {}) == {"image_index": 0, "format": "png"}
    assert {s.parent.span_id for s in found.values() if s.parent} == {call.context.span_id}
    assert dict(call.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "service",
        "rpc.method": "Generate",
        "triton.model_name": "demo",
        "triton.model_version": "1",
        "triton.request_id": "r",
    }
    assert call.resource.attributes["service.name"] == "test"
    assert abs((call.end_time or 0) - time.time_ns()) < 60e9


def test_without_a_caller_the_call_is_the_root_and_an_error_is_its_status() -> None:
    trace = replace(a_trace(Queued(1)), request_id="")
    with pytest.raises(ValueError), trace.answering():
        raise ValueError("no")
    call = spans(trace)["service/Generate"]
    assert call.parent is None
    assert "triton.request_id" not in (call.attributes or {}), "it brought none"
    assert call.status.status_code is otel.StatusCode.ERROR
    assert call.status.description == "ValueError: no"


def test_a_model_without_events_has_the_stages_of_its_statistics() -> None:
    trace = a_trace()
    trace.observe(RequestRecord(spent=SPENT))
    found = spans(trace)
    lengths = {name: ((s.end_time or 0) - (s.start_time or 0)) / 1e6 for name, s in found.items()}
    assert (lengths["queue"], lengths["compute"]) == (4.0, 6.0)
    assert found["compute"].start_time == found["queue"].end_time


@pytest.mark.parametrize(("events", "cached"), [((), True), (DRAWN, False)], ids=["cached", "an image"])
def test_nothing_was_computed_for_an_answer_from_the_cache_and_an_image_tells_of_its_own_stages(
    events: tuple[Event, ...], cached: bool
) -> None:
    trace = a_trace(*events)
    trace.observe(RequestRecord(spent=SPENT, cached=cached))
    assert telemetry.stages(trace) == trace.stages


class NoCollector:
    """An exporter that tries until it is told to stop."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.told.wait(PATIENCE)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.told.set()


def test_a_collector_that_is_not_there_does_not_hold_up_the_servers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "CLOSE_WITHIN", 0.01, raising=False)
    opened = telemetry.Telemetry(TelemetryConfig(), NoCollector())
    (trace := a_trace()).end()
    opened.write(trace)
    began = time.monotonic()
    opened.close()
    assert time.monotonic() - began < 15  # OpenTelemetry itself would wait for twice as long


class Collector:
    """An exporter that fails or succeeds as it is told, once it may."""

    def __init__(self) -> None:
        self.answers: queue.Queue[SpanExportResult] = queue.Queue()
        self.asked = threading.Semaphore(0)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.release()
        telemetry.LIBRARY_LOG.getChild("exporter").warning("no connection")
        return self.answers.get(timeout=PATIENCE)

    def shutdown(self) -> None:
        pass


def test_traces_that_are_not_sent_are_counted_and_logged_once_until_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    collector, lost = Collector(), Counter[str]()
    config = TelemetryConfig(max_queue_size=2, max_export_batch_size=1)
    opened = telemetry.Telemetry(config, collector, lambda number: lost.update(lost=number))

    def write(traces: int) -> None:
        for _ in range(traces):
            (trace := a_trace()).end()
            opened.write(trace)

    write(1)
    assert collector.asked.acquire(timeout=PATIENCE)
    write(4)  # the first is on its way, the last two wait, and the two before them are dropped
    for answer in (SpanExportResult.FAILURE, SpanExportResult.FAILURE, SpanExportResult.SUCCESS):
        collector.answers.put(answer)
    opened.close()
    assert lost["lost"] == 4
    said = [(record.levelname, record.getMessage()) for record in caplog.records if "Queue full" not in record.msg]
    assert said == [
        ("WARNING", "no connection"),
        ("ERROR", "traces cannot be sent, and are lost until they can be: the lines before say why"),
        ("INFO", "traces can be sent again"),
    ]


def write_to(opened: telemetry.Telemetry, *traces: Trace) -> None:
    for trace in traces:
        trace.end()
        opened.write(trace)


def test_the_next_time_that_traces_are_not_sent_the_reason_is_logged_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    collector = Collector()
    opened = telemetry.Telemetry(TelemetryConfig(max_export_batch_size=2), collector)
    for answer in (SpanExportResult.FAILURE, SpanExportResult.SUCCESS, SpanExportResult.FAILURE):
        collector.answers.put(answer)
    write_to(opened, a_trace(), a_trace(), a_trace())  # of two spans each
    opened.close()
    assert [r.levelname for r in caplog.records] == ["WARNING", "ERROR", "INFO", "WARNING", "ERROR"]


def test_an_exporter_that_raises_is_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    class Raising(Collector):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            raise ConnectionError("nobody is there")

    lost: list[int] = []
    opened = telemetry.Telemetry(TelemetryConfig(), Raising(), lost.append)
    write_to(opened, a_trace(), a_trace())
    opened.close()
    assert sum(lost) == 2
    said = [r.getMessage() for r in caplog.records if r.name == telemetry.__name__]
    assert said == ["traces cannot be sent, and are lost until they can be: nobody is there"]


def test_a_trace_that_the_caller_chose_not_to_sample_is_not_lost() -> None:
    memory, lost = InMemorySpanExporter(), list[int]()
    opened = telemetry.Telemetry(TelemetryConfig(), memory, lost.append)
    write_to(opened, a_trace(traceparent=PARENT.removesuffix("01") + "00"), a_trace())
    opened.close()
    assert [s.name for s in memory.get_finished_spans()] == ["send", "service/Generate"], "those of the second"
    assert sum(lost) == 0


def test_spans_are_sent_as_often_as_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")  # what they would wait for otherwise
    collector = Collector()
    collector.answers.put(SpanExportResult.SUCCESS)
    opened = telemetry.Telemetry(TelemetryConfig(schedule_delay=1), collector)
    write_to(opened, a_trace())
    assert collector.asked.acquire(timeout=PATIENCE)
    opened.close()


def test_once_all_is_sent_nothing_waits_for_the_collector_to_be_given_up() -> None:
    """A timer that is left running keeps the process alive."""
    collector, others = NoCollector(), {*threading.enumerate()}
    telemetry.Telemetry(TelemetryConfig(), collector).close()
    collector.told.clear()
    for thread in {*threading.enumerate()} - others:
        thread.join(PATIENCE)
    assert not collector.told.is_set()


def test_the_flags() -> None:
    wanted = (
        "mode=opentelemetry", "level=TIMESTAMPS", "level=TENSORS", "rate=5", "opentelemetry,url=http://c:1/v1/traces",
        "opentelemetry,resource=service.name=x", "opentelemetry,resource=zone=a=b",
        "opentelemetry,bsp_schedule_delay=9",
    )  # fmt: skip
    config = read_config(parser().parse_args([part for text in wanted for part in ("--trace-config", text)]))
    assert config.trace == TraceSettings(frozenset(TraceLevel), trace_rate=5, trace_mode=TraceMode.OPENTELEMETRY)
    assert config.telemetry.url == "http://c:1/v1/traces"
    assert dict(config.telemetry.resource) == {"service.name": "x", "zone": "a=b"}
    assert config.telemetry.schedule_delay == 9


@pytest.mark.parametrize(
    ("flag", "text", "accepted"),
    [
        ("trace", "rate=-1", "a whole number from 0 on is"),
        ("trace", "rate=0.5", "a whole number from 0 on is"),
        ("trace", "level=MAX", "OFF, TIMESTAMPS and TENSORS are"),
        ("trace", "mode=zipkin", "triton, opentelemetry are"),
        ("trace", "rate", "are known, as NAME=VALUE"),
        ("trace", "colour=red", "are known, as NAME=VALUE"),
        ("trace", "opentelemetry,bsp_max_queue_size=0", "a whole number above 0 is accepted"),
        ("trace", "opentelemetry,bsp_schedule_delay=soon", "a whole number above 0 is accepted"),
        ("metrics", "foo=1", "counter_latencies, histogram_latencies, summary_latencies, summary_quantiles are"),
        ("metrics", "summary_quantiles=0.5:0.1,2:3", "a number from 0 to 1 is accepted"),
        ("metrics", "summary_quantiles=half", "a number from 0 to 1 is accepted"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_accepted(
    flag: str, text: str, accepted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([f"--{flag}-config", text])
    said = capsys.readouterr().err
    assert f"argument --{flag}-config: " in said
    assert accepted in said


def test_spans_are_not_sent_more_at_a_time_than_may_wait() -> None:
    arguments = parser().parse_args(["--trace-config", "opentelemetry,bsp_max_queue_size=100"])
    with pytest.raises(ConfigError, match=r"bsp_max_export_batch_size is 512, and may be at most .*, 100"):
        read_config(arguments)


@pytest.mark.parametrize("value", ["-1", "99999999999", "soon"])
def test_what_grpc_would_not_take_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([f"--grpc-keepalive-time={value}"])
    assert f"'{value}': a whole number from 0 to 2147483647 is accepted" in capsys.readouterr().err


def test_a_file_has_as_many_traces_as_was_asked_for(tmp_path: Path) -> None:
    settings = replace(ON, trace_mode=TraceMode.TRITON, trace_file=str(tmp_path / "traces"), log_frequency=2)
    for number in (1, 2, 3):
        append_trace(Trace(id=number, model="m", version="1", request_id="", settings=settings, call=Call("m")))
    written = {p.name: {r["id"] for r in json.loads(p.read_text())} for p in tmp_path.iterdir()}
    assert written == {"traces.0": {1, 2}, "traces.1": {3}}


def records(file: Path, trace: Trace) -> list[dict[str, Any]]:
    trace.settings = replace(trace.settings, trace_mode=TraceMode.TRITON, trace_file=str(file))
    append_trace(trace)
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def test_a_file_tells_in_their_order_when_the_parts_of_a_request_began_and_ended(tmp_path: Path) -> None:
    trace = a_trace(*DRAWN)  # its steps are no points of Triton's
    trace.observe(RequestRecord(spent=SPENT, began=trace.began + 500_000))
    trace.stages.append(Stage("send", trace.began + 10_000_000, trace.began + 20_000_000))
    trace.answered, trace.ended = trace.began + 30_000_000, trace.began + 40_000_000
    points = [(p["name"], p["ns"] - trace.began) for p in records(tmp_path / "x", trace)[1]["timestamps"]]
    assert points == [
        ("REQUEST_START", 0),
        ("QUEUE_START", 500_000),
        ("COMPUTE_START", 4_500_000),
        ("COMPUTE_INPUT_END", 5_500_000),
        ("COMPUTE_OUTPUT_START", 7_500_000),
        ("GRPC_SEND_START", 10_000_000),
        ("COMPUTE_END", 10_500_000),
        ("GRPC_SEND_END", 20_000_000),
        ("REQUEST_END", 30_000_000),
    ]


def test_a_request_that_was_refused_before_any_version_had_it_is_in_the_file_too(tmp_path: Path) -> None:
    trace = replace(a_trace(), version="")
    trace.end()
    about, times = records(tmp_path / "x", trace)
    assert about == {"id": 1, "model_name": "demo", "model_version": -1, "request_id": "r"}
    points = {p["name"]: p["ns"] for p in times["timestamps"]}
    assert points["REQUEST_START"] == points["QUEUE_START"] == points["COMPUTE_END"] == trace.began
    assert points["REQUEST_END"] == trace.ended


def test_without_the_extra_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"pip install 'zserve\[tracing\]'"):
        telemetry.Telemetry(TelemetryConfig())


@pytest.mark.parametrize(
    ("datatype", "data", "values"),
    [
        (DataType.BOOL, b"\1\0", [True, False]),
        (DataType.INT16, b"\xff\xff\2\0", [-1, 2]),
        (DataType.FP16, b"\0\x3c\0\xc0", [1.0, -2.0]),
        (DataType.BF16, b"\x80\x3f\0\xc0", [1.0, -2.0]),
        (DataType.BYTES, join_strings([b"a", "é".encode()]), ["a", "é"]),
    ],
)
def test_the_elements_of_a_tensor(datatype: DataType, data: bytes, values: list[object]) -> None:
    assert Tensor("t", datatype, (2,), data).values() == values
