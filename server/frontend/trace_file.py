"""Traces in a file, in Triton's JSON."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from server.settings import TraceLevel
from server.statistics import RequestRecord
from server.tensors import Tensor
from server.tracing import Trace


def append_trace(trace: Trace) -> None:
    """Appends to the JSON list in the trace's file, which is valid JSON after every trace."""
    settings = trace.settings
    part = f".{(trace.id - 1) // settings.log_frequency}" if settings.log_frequency else ""
    text = ",\n".join(json.dumps(record) for record in _records(trace))
    path = Path(settings.trace_file + part)
    with path.open("r+b" if path.exists() else "w+b") as file:
        empty = file.seek(0, os.SEEK_END) == 0
        if not empty:
            file.seek(-1, os.SEEK_END)
        file.write((("[" if empty else ",\n") + text + "]").encode())


def _records(trace: Trace) -> Iterator[dict[str, object]]:
    version = int(trace.version or -1)
    yield {"id": trace.id, "model_name": trace.model, "model_version": version, "request_id": trace.request_id}
    if TraceLevel.TIMESTAMPS in trace.settings.trace_level:
        points = sorted(_points(trace), key=lambda point: point[1])
        yield {"id": trace.id, "timestamps": [{"name": name, "ns": ns} for name, ns in points]}
    yield from _tensors(trace, "TENSOR_QUEUE_INPUT", trace.inputs)
    yield from _tensors(trace, "TENSOR_BACKEND_OUTPUT", trace.outputs)


def _points(trace: Trace) -> Iterator[tuple[str, int]]:
    record = trace.record or RequestRecord(began=trace.began)
    spent, queued = record.spent, record.began
    compute = queued + spent.queue
    infer = compute + spent.compute_input
    output = infer + spent.compute_infer
    yield from (("REQUEST_START", trace.began), ("QUEUE_START", queued), ("COMPUTE_START", compute))
    yield from (("COMPUTE_INPUT_END", infer), ("COMPUTE_OUTPUT_START", output))
    yield from (("COMPUTE_END", output + spent.compute_output), ("REQUEST_END", trace.answered))
    for stage in trace.stages:
        if stage.name == "send":
            yield from (("GRPC_SEND_START", stage.began), ("GRPC_SEND_END", stage.ended))


def _tensors(trace: Trace, activity: str, tensors: Iterable[Tensor]) -> Iterator[dict[str, object]]:
    for tensor in tensors:
        shown = {
            "name": tensor.name,
            "data": ",".join(map(str, tensor.values())),
            "shape": ",".join(map(str, tensor.shape)),
            "dtype": tensor.datatype,
        }
        yield {"id": trace.id, "activity": activity, "tensor": shown}
