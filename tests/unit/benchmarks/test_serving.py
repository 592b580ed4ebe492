"""How a server that is measured is waited for, and what one can be measured with."""

import asyncio
import os
import signal
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest

from benchmarks import serving
from benchmarks.record import BenchmarkError
from server.errors import ConfigError
from tests.integration.light_worker import LIGHT


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
    assert serving.served_rows(("diffusers", "diffusers-compile", "eager", "onnxruntime")) == ["eager", "onnxruntime"]
    with pytest.raises(BenchmarkError, match="aotinductor, eager, aotinductor-fp8 are accepted"):
        serving.served_rows(("diffusers", "diffusers-compile"))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository of one model, as far as a worker without a model has to see it."""
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder.parent / "config.pbtxt").touch()
    return tmp_path


async def test_a_server_that_is_stopped_ends_what_measures_it(models: Path) -> None:
    """The signal is the server's, which is in the same process, and the benchmark would have gone on without it."""
    with pytest.raises(BenchmarkError, match="was stopped while it was measured"):
        async with serving.frontend(models, LIGHT):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
    await asyncio.sleep(0)  # nothing of it is left to cancel this task


async def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        async with serving.frontend(tmp_path, LIGHT):
            pytest.fail("it is ready")


async def test_what_measures_a_server_can_be_cancelled(models: Path) -> None:
    async def measure() -> None:
        async with serving.frontend(models, LIGHT):
            begun.set()
            await asyncio.sleep(60)

    begun = asyncio.Event()
    task = asyncio.create_task(measure())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
