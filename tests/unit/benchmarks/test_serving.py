"""How a server that is measured is waited for, and what one can be measured with."""

import tempfile
from typing import Any, NoReturn

import grpc
import pytest

from benchmarks import serving
from benchmarks.record import BenchmarkError


def test_attempts_to_connect_do_not_get_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself gRPC tries again after ever longer times, and the first answer was seen up to 2.7 s late."""
    told: dict[str, int] = {}

    def connect(url: str, options: list[tuple[str, int]]) -> NoReturn:
        told.update(options)
        raise ConnectionError

    monkeypatch.setattr(grpc, "insecure_channel", connect)
    process: Any = None
    with tempfile.TemporaryFile("w+") as log, pytest.raises(ConnectionError):
        serving._wait("127.0.0.1:1", process, 0.0, log)
    assert 0 < told["grpc.initial_reconnect_backoff_ms"] <= told["grpc.max_reconnect_backoff_ms"] <= 20


def test_diffusers_is_no_row_of_a_server() -> None:
    assert serving.served_rows(("diffusers", "eager", "onnxruntime")) == ["eager", "onnxruntime"]
    with pytest.raises(BenchmarkError, match="aotinductor, eager, aotinductor-fp8 are accepted"):
        serving.served_rows(("diffusers",))
