"""OpenTelemetry end to end: a real server sends the spans of both services to a real collector."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from protos.zserve.v1 import image_generation_pb2 as pb
from tests.conftest import MODEL, copy_model
from tests.integration.process import ServerProcess, wait_for
from tests.integration.triton.conftest import bytes_tensor

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = ("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01")
GENERATE = "zserve.v1.ImageGeneration/Generate"
INFER = "inference.GRPCInferenceService/ModelInfer"


class Collector(HTTPServer):
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []
        self.services: set[str] = set()

    def of(self, method: str) -> list[Span]:
        """The span of the call of `method` and those below it, once they are there."""
        call = wait_for(lambda: [s for s in self.spans if s.name == method])[0]
        return [call, *(s for s in self.spans if s.parent_span_id == call.span_id)]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.services |= {a.value.string_value for a in resource.resource.attributes}
            self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_both_services_tell_where_the_time_of_a_request_went(
    repository: Path, tmp_path: Path, collector: Collector
) -> None:
    copy_model(repository, tmp_path)
    wanted = (
        "mode=opentelemetry", "level=TIMESTAMPS", "rate=0", "opentelemetry,resource=service.name=images",
        f"opentelemetry,url=http://127.0.0.1:{collector.server_port}/v1/traces", "opentelemetry,bsp_schedule_delay=100",
    )  # fmt: skip
    with ServerProcess(tmp_path, *(p for text in wanted for p in ("--trace-config", text))) as server:
        draw(server)
        infer(server)
        generated, inferred = collector.of(GENERATE), collector.of(INFER)
    names = ["decode", "encode", "encode_image", "queue", "send", "step", "step"]
    assert sorted(s.name for s in generated[1:]) == names
    assert sorted(s.name for s in inferred[1:]) == [n for n in names if n != "encode"]  # the prompt was cached
    assert {s.trace_id.hex() for s in (*generated, *inferred)} == {TRACE_ID}
    assert generated[0].parent_span_id.hex() == "b7ad6b7169203331"
    for call, *stages in (generated, inferred):
        assert all(call.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano for s in stages)
    assert len([s for s in collector.spans if s.name == GENERATE]) == 1
    assert "images" in collector.services


def draw(server: ServerProcess) -> None:
    """Twice; only the second call brings a trace context."""
    request = pb.GenerateRequest(prompt="a red circle", num_inference_steps=2, seed=7)
    with server.client() as client:
        list(client._stub.Generate(pb.GenerateRequest(prompt="a star", num_inference_steps=1)))
        list(client._stub.Generate(request, metadata=(PARENT,)))


def infer(server: ServerProcess) -> None:
    prompt = [bytes_tensor("PROMPT", "a red circle")]
    with triton.InferenceServerClient(server.url) as client:
        client.infer(MODEL, prompt, parameters={"num_inference_steps": 2}, headers=dict([PARENT]))
