"""Workers that are killed, hang, starve or compute rubbish: what a client sees, and that the server goes on."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio

from client import GenerationFailedError
from client.messages import ImageRequest
from server.frontend import serving as module
from server.frontend.workers import Worker, _Process
from tests.conftest import MODEL
from tests.integration import faulty_worker, light_worker
from tests.integration.frontend import FAULTY, Running, Seen, draw, light_repository, make_repository, serving
from tests.integration.light_worker import LIGHT

CONFIG = """
max_batch_size: 4
instance_group { count: 2 kind: KIND_CPU }
parameters { key: "default_size" value { string_value: "64x64" } }
parameters { key: "default_num_inference_steps" value { string_value: "4" } }
"""
STEPS_BEFORE_THE_GATE = 3
ONE = CONFIG.replace("count: 2", "count: 1")
pytestmark = pytest.mark.asyncio(loop_scope="module")


class Gate:
    """Holds requests whose prompt is its path in the middle of their steps; see `light_worker`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def shut(self) -> None:
        self.path.unlink(missing_ok=True)

    def open(self) -> None:
        self.path.touch()


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    return Gate(tmp_path_factory.mktemp("gate") / "open")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    models = make_repository(repository / MODEL, tmp_path_factory.mktemp("failures"), ONE)
    async with serving(models, FAULTY) as running:
        await all_ready(running)
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def light(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """For what happens to processes, whatever they compute."""
    async with serving(light_repository(tmp_path_factory.mktemp("light"), CONFIG), LIGHT) as running:
        await all_ready(running)
        yield running


async def all_ready(server: Running) -> None:
    await server.until(lambda: all(w.state.value == "ready" for w in server.workers))


def asked(prompt: str = "a red circle", **options: object) -> ImageRequest:
    return ImageRequest(prompt, image_format="raw", **{"seed": 7, **options})  # type: ignore[arg-type]


@asynccontextmanager
async def interrupted(server: Running, gate: Gate) -> AsyncIterator[tuple[Worker, Seen]]:
    """A request that is held in the middle of its steps, and the worker that has it; let go and answered in the end."""
    gate.shut()
    seen = Seen()
    drawing = asyncio.create_task(draw(server.client, asked(str(gate.path)), seen))
    await server.until(lambda: len(seen.of("progress")) == STEPS_BEFORE_THE_GATE)
    (busy,) = [w for w in server.workers if w.config.instance == seen.of("started")[0].instance]
    yield busy, seen
    gate.open()
    await drawing


async def test_a_killed_worker_is_replaced_and_its_request_starts_over(light: Running, gate: Gate) -> None:
    async with interrupted(light, gate) as (busy, seen):
        before = busy.restarts
        os.kill(busy.pid or 0, signal.SIGKILL)
    undisturbed = (await draw(light.client, asked(str(gate.path)))).of("image")
    assert [s.attempt for s in seen.of("started")] == [1, 2]
    assert [i.data for i in seen.of("image")] == [i.data for i in undisturbed]
    assert seen.kinds.count("completed") == 1
    await light.until(lambda: busy.restarts == before + 1)
    await all_ready(light)


@pytest.mark.parametrize("killing", [light_worker.ENDS_WITH_A_STEP, light_worker.ENDS_AS_IT_IS_READ])
async def test_a_request_that_ends_workers_is_refused_alone(light: Running, killing: str) -> None:
    """With a step, or before the worker can say that it has begun."""
    bad = draw(light.client, asked(killing))
    good = [draw(light.client, asked(seed=seed, num_inference_steps=8)) for seed in range(12)]
    refused, *drawn = await asyncio.gather(bad, *good, return_exceptions=True)
    assert isinstance(refused, GenerationFailedError)
    assert refused.code is grpc.StatusCode.INTERNAL
    assert "do not send it again" in refused.details
    assert [len(d.of("image")) for d in drawn if isinstance(d, Seen)] == [1] * 12
    await all_ready(light)


async def test_a_stopped_process_is_replaced(light: Running, gate: Gate) -> None:
    async with interrupted(light, gate) as (busy, seen):
        heard = busy.info
        await light.until(lambda: busy.info is not heard)  # a heartbeat that is under way would be waited for
        os.kill(busy.pid or 0, signal.SIGSTOP)
        patient, busy.config = busy.config, replace(busy.config, patience=0.5)
        await light.until(lambda: busy.state.value != "ready")
        busy.config = patient
    assert [s.attempt for s in seen.of("started")] == [1, 2]
    assert len(seen.of("image")) == 1
    await all_ready(light)


async def test_requests_do_not_wait_for_a_process_that_sigkill_does_not_end(
    light: Running, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a driver does not return: until it does, the worker gets nothing more."""
    with monkeypatch.context() as driver:
        driver.setattr(_Process, "kill", lambda process: None)
        async with interrupted(light, gate) as (busy, seen):
            stuck, patient = psutil.Process(busy.pid), busy.config
            busy.config = replace(patient, patience=0.5)
            stuck.suspend()
            await light.until(lambda: len(seen.of("started")) == 2)
            busy.config = patient
        assert busy.state.value == "restarting"
        assert (await draw(light.client, asked())).kinds[-1] == "completed"
        assert stuck.is_running()
    stuck.kill()
    assert seen.of("started")[1].instance != busy.config.instance
    assert len(seen.of("image")) == 1
    await all_ready(light)


@pytest.mark.parametrize(
    "hanging", [{"width": faulty_worker.HANGS}, {"prompt": "a red circle " * 200, "truncate": True}]
)
async def test_a_device_that_does_not_come_back_is_given_up(
    server: Running, hanging: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a step, or from the prompt, before which it has to be known that the request has begun."""
    monkeypatch.setattr(module, "POISON", 1)  # each is a real worker to start
    with pytest.raises(GenerationFailedError, match="do not send it again") as failure:
        await draw(server.client, asked(**hanging))
    assert failure.value.code is grpc.StatusCode.INTERNAL
    await all_ready(server)
    assert (await draw(server.client, asked())).kinds[-1] == "completed"


async def test_no_memory_alone_is_refused_with_the_figures(server: Running) -> None:
    with pytest.raises(GenerationFailedError, match="MiB free of") as failure:
        await draw(server.client, asked(width=faulty_worker.STARVES))
    assert failure.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await draw(server.client, asked())).kinds[-1] == "completed"


async def test_no_memory_together_is_tried_in_smaller_batches(server: Running) -> None:
    requests = [asked(width=faulty_worker.TOO_LARGE_TOGETHER, seed=seed, num_images=4) for seed in range(4)]
    drawn = await asyncio.gather(*(draw(server.client, r) for r in requests))
    assert [len(d.of("image")) for d in drawn] == [4] * 4


async def test_an_overflow_is_made_again_on_eager_and_said_everywhere(server: Running) -> None:
    """The last one of this server, since its worker stays on eager."""
    seen = await draw(server.client, asked(width=faulty_worker.OVERFLOWS))
    denoiser = seen.of("completed")[0].engines[1]
    assert (denoiser.component, denoiser.backend) == ("denoiser", "eager")
    assert "not finite" in denoiser.fallback_reason
    (used,) = [w for w in server.workers if w.config.instance == seen.of("started")[0].instance]
    # A heartbeat brings the news to the frontend.
    await server.until(lambda: used.info and used.info.engines[1].fallback_reason)
    instances = {i.name: i for i in (await server.client.model()).instances}
    assert "not finite" in instances[used.config.instance].engines[1].fallback_reason


async def test_engines_that_end_their_process_at_the_start_are_turned_off(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One while it is loaded, and in the next process another at warm-up."""
    monkeypatch.setenv("FAULTY_LOAD", "prompt_encoder")
    monkeypatch.setenv("FAULTY_WARM_UP", "image_decoder")
    models = make_repository(repository / MODEL, tmp_path, ONE.replace("max_batch_size: 4", "max_batch_size: 1"))
    async with serving(models, FAULTY) as server:
        seen = await draw(server.client, asked())
        off = [e for e in seen.of("completed")[0].engines if "SIGABRT" in e.fallback_reason]
        assert [(e.component, e.backend) for e in off] == [("prompt_encoder", "eager"), ("image_decoder", "eager")]
        assert server.workers[0].restarts == 2
