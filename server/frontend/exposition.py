"""Prometheus' text format in plain decimals, over HTTP.

prometheus_client's own writer prints 8589934592 as 8.589934592e+09, which perf_analyzer reads as 8.
"""

import logging
import math
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})
ESCAPES = {**HELP_ESCAPES, ord('"'): r"\""}

PATIENCE = 10.0  # seconds for a client to send its request or read the response; until then it occupies a thread


class _Server(ThreadingHTTPServer):
    """Answers each request on a thread of its own."""

    daemon_threads = True

    def __init__(self, address: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Nobody has to look at a client that is gone, such as a probe of the port; socketserver prints tracebacks."""
        if not isinstance(sys.exception(), ConnectionError):
            log.exception("the metrics cannot be read")

    def server_bind(self) -> None:
        """HTTPServer's own also looks up this machine's name: nobody needs it, and a dead DNS server takes long."""
        TCPServer.server_bind(self)


def render(registry: CollectorRegistry) -> str:
    """Everything in the registry as text."""
    return "\n".join(line for family in registry.collect() for line in _lines(family)) + "\n"


def serve(registry: CollectorRegistry, address: str, port: int) -> tuple[int, Callable[[], None]]:
    """Answers /metrics from a thread of its own; returns the port, and a function that stops it."""

    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE

        def do_GET(self) -> None:
            known = self.path.partition("?")[0] in ("/", "/metrics")
            body = render(registry).encode() if known else b"metrics are at /metrics\n"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
            """Logs nothing: there is a scrape every few seconds."""

    server = _Server(address, port, Handler)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_address[1], stop


def _lines(family: Metric) -> Iterator[str]:
    samples = [s for s in family.samples if not s.name.endswith("_created")]
    name = family.name
    if family.type == "counter" and all(s.name == f"{name}_total" for s in samples):
        name += "_total"
    yield f"# HELP {name} {family.documentation.translate(HELP_ESCAPES)}"
    yield f"# TYPE {name} {family.type}"
    yield from map(_line, samples)


def _line(sample: Sample) -> str:
    labels = ",".join(f'{key}="{value.translate(ESCAPES)}"' for key, value in sorted(sample.labels.items()))
    return f"{sample.name}{{{labels}}} {decimal(sample.value)}" if labels else f"{sample.name} {decimal(sample.value)}"


def decimal(value: float) -> str:
    """`value` without an exponent, whatever its size."""
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    if value == int(value):
        return str(int(value))
    text = repr(value)
    return f"{value:.12f}".rstrip("0") if "e" in text else text
