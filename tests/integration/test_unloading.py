"""Models that are unloaded or replaced while requests for them are under way, which are held as a test wants it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from client import GenerationFailedError
from client.messages import ImageRequest
from server.config import ControlMode
from server.frontend import served_model as module
from tests.integration.frontend import Running, Seen, draw, light_repository, serving
from tests.integration.light_worker import LIGHT
from tests.integration.process import PATIENCE
from tests.integration.triton.conftest import ENDLESS, IDENTITIES, some_bytes, write_model

CONFIG = """
max_batch_size: 1
parameters { key: "default_num_inference_steps" value { string_value: "4" } }
"""
STEPS_BEFORE_THE_GATE = 3
MODEL = "light"


class Server:
    """One with a model whose requests are held until `gate` is there."""

    def __init__(self, running: Running, control: triton.InferenceServerClient, gate: Path) -> None:
        self.running, self.control, self.gate = running, control, gate
        self.held = ImageRequest(str(gate), width=64, height=64, seed=7, image_format="raw")

    async def hold(self, seen: Seen) -> "asyncio.Task[Seen]":
        """A request that is in the middle of its steps."""
        task = asyncio.create_task(draw(self.running.client, self.held, seen))
        await self.running.until(lambda: len(seen.of("progress")) == STEPS_BEFORE_THE_GATE or task.done())
        return task

    async def wait_behind(self) -> list["asyncio.Task[Seen]"]:
        """Two requests more: one that the worker has not begun with, and one that it has no room for."""
        tasks = [asyncio.create_task(draw(self.running.client, self.held)) for _ in range(2)]
        queue = self.running.queue
        await self.running.until(lambda: (queue.running, queue.waiting) == (2, 1))
        return tasks


@asynccontextmanager
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain: float) -> AsyncIterator[Server]:
    monkeypatch.setattr(module, "DRAIN_SECONDS", drain)
    models = light_repository(tmp_path / "models", CONFIG)
    control_mode = {"model_control_mode": ControlMode.EXPLICIT, "load_model": (MODEL,)}
    async with serving(models, LIGHT, **control_mode) as running, triton.InferenceServerClient(running.url) as control:
        yield Server(running, control, tmp_path / "gate")


async def refused(request: "asyncio.Task[Seen]") -> tuple[grpc.StatusCode, str]:
    with pytest.raises(GenerationFailedError) as failure:
        await asyncio.wait_for(request, PATIENCE)
    return failure.value.code, failure.value.details


async def test_requests_under_way_outlive_an_unload_and_its_worker_and_no_more_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(tmp_path, monkeypatch, drain=PATIENCE) as s:
        seen = Seen()
        requests = [await s.hold(seen), *await s.wait_behind()]
        await s.control.unload_model(MODEL)
        code, text = await refused(asyncio.create_task(draw(s.running.client, s.held)))
        assert (code, "this server has: none" in text) == (grpc.StatusCode.NOT_FOUND, True)
        os.kill(s.running.workers[0].pid or 0, signal.SIGKILL)
        s.gate.touch()
        for request in requests:
            assert len((await asyncio.wait_for(request, PATIENCE)).of("image")) == 1
        assert [started.attempt for started in seen.of("started")] == [1, 2]
        await s.running.until(lambda: s.running.workers[0].state.value == "stopped")


@pytest.mark.parametrize("reloaded", [False, True], ids=["unloaded", "reloaded"])
async def test_what_does_not_finish_in_time_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reloaded: bool
) -> None:
    async with server(tmp_path, monkeypatch, drain=0.1) as s:
        requests = [await s.hold(Seen()), *await s.wait_behind()]
        if reloaded:
            (tmp_path / "models" / MODEL / "config.pbtxt").write_text(CONFIG + "# changed")
            await s.control.load_model(MODEL)
        else:
            await s.control.unload_model(MODEL)
        for request in requests:
            code, text = await refused(request)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert f"version 1 of model '{MODEL}' was unloaded before the request was done" in text
        s.gate.touch()
        if reloaded:
            assert len((await draw(s.running.client, s.held)).of("image")) == 1


@pytest.mark.parametrize("how", ["unloaded", "stopped"])
async def test_a_tensor_models_requests_that_do_not_finish_in_time_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """One is executed, the other waits for it."""
    monkeypatch.setattr(module, "DRAIN_SECONDS", 0.1)
    models = light_repository(tmp_path / "models", CONFIG)
    write_model(models, "identity", IDENTITIES["identity"])
    options = {"model_control_mode": ControlMode.EXPLICIT, "load_model": (MODEL, "identity"), "exit_timeout_secs": 0.1}
    async with serving(models, LIGHT, **options) as running, triton.InferenceServerClient(running.url) as client:
        requests = [asyncio.create_task(client.infer("identity", [some_bytes()], parameters=ENDLESS)) for _ in range(2)]
        model = running.frontend._repository.find("identity")
        await running.until(lambda: (model.statistics.under_way, model.statistics.pending) == (2, 1))
        if how == "unloaded":
            await client.unload_model("identity")
        else:
            running.frontend.stop()
        for request in requests:
            with pytest.raises(InferenceServerException, match="model 'identity' was unloaded before the request was"):
                await asyncio.wait_for(request, PATIENCE)
            assert isinstance(cause := request.exception(), InferenceServerException)
            assert cause.status() == "StatusCode.UNAVAILABLE"
        assert model.statistics.under_way == 0
