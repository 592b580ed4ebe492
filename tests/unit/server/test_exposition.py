"""The text of the metrics, and the port that serves it."""

import socket
import struct
import threading
import urllib.request
from collections.abc import Iterator
from http.client import RemoteDisconnected

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.frontend import exposition
from server.frontend.exposition import decimal, render, serve

PATIENCE = 300.0  # seconds that nothing here takes


NUMBERS = {8589934592.0: "8589934592", 1e30: str(int(1e30)), 0.25: "0.25", 1e-7: "0.0000001", float("inf"): "+Inf"}


@pytest.mark.parametrize(("value", "text"), NUMBERS.items())
def test_numbers_have_no_exponent(value: float, text: str) -> None:
    assert decimal(value) == text


def test_the_exposition() -> None:
    metrics = CollectorRegistry()
    Counter("made", 'with "quotes"', ("b", "a"), registry=metrics).labels('x"y', "1").inc(3)
    Gauge("held", "bytes", registry=metrics).set(2**40)
    assert render(metrics).splitlines() == [
        '# HELP made_total with "quotes"',
        "# TYPE made_total counter",
        r'made_total{a="1",b="x\"y"} 3',
        "# HELP held bytes",
        "# TYPE held gauge",
        "held 1099511627776",
    ]


@pytest.mark.parametrize(("address", "host"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("::", "127.0.0.1")])
def test_it_listens_on_addresses_of_both_families(address: str, host: str) -> None:
    port, stop = serve(CollectorRegistry(), address, 0)
    assert urllib.request.urlopen(f"http://{host}:{port}/metrics").status == 200
    stop()


def test_who_says_nothing_to_the_metrics_has_no_thread_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "PATIENCE", 0.1)
    port, stop = serve(CollectorRegistry(), "127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as silent:
        assert silent.recv(1) == b""
    stop()


def test_metrics_are_served_without_asking_dns_for_this_machines_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop would wait for the answer."""

    def ask(name: str = "") -> str:
        raise AssertionError("it was asked for")

    monkeypatch.setattr(socket, "getfqdn", ask)
    metrics = CollectorRegistry()
    Gauge("held", "bytes", registry=metrics).set(1)
    port, stop = serve(metrics, "127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert b"held 1" in answer.read()
    stop()


def test_a_client_that_is_gone_leaves_no_traceback_and_what_cannot_be_read_is_in_the_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Collector):
        def collect(self) -> Iterator[Metric]:
            raise ValueError("no figures")

    metrics = CollectorRegistry(auto_describe=False)
    metrics.register(Broken())
    others = {*threading.enumerate()}
    port, stop = serve(metrics, "127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", port)) as probe:  # it is reset, as some balancers' probes do
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with pytest.raises(RemoteDisconnected):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")
    stop()
    for thread in {*threading.enumerate()} - others:
        thread.join(PATIENCE)
    assert [record.getMessage() for record in caplog.records] == ["the metrics cannot be read"]
    assert "no figures" in caplog.text
    assert capsys.readouterr().err == ""
