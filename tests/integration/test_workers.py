"""The processes behind a model, as the frontend sees them: kept, lost, replaced; with workers that cost nothing."""

import asyncio
import os
import re
import shlex
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil
import pytest
import tritonclient.grpc.aio as triton

from client import GenerationFailedError
from client.messages import ImageRequest
from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc
from server.config import ControlMode, FallbackPolicy, ModelConfig
from server.errors import EngineLoadError, OvertakenError, WorkerLostError
from server.frontend import workers
from server.frontend.exposition import render
from server.frontend.metrics import Metrics
from server.frontend.serving import Serving
from server.frontend.workers import KEPT_BYTES, Worker, WorkerState, _end_of, _Process
from server.launch import WorkerConfig
from server.requests import GenerationRequest, Started
from server.rpc.convert import encode_request
from server.rpc.images import REACHED, WAITED, ImageGenerationClient
from server.settings import TraceLevel, TraceSettings
from tests.conftest import MODEL
from tests.fakes import FakeImages, a_request
from tests.integration.frontend import Running, Seen, draw, light_repository, make_repository, serving
from tests.integration.light_worker import LIGHT
from tests.integration.process import PATIENCE, is_gone, wait_for


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    async with serving(light_repository(tmp_path / "models"), LIGHT) as running:
        yield running


class Alone:
    """A worker without a server."""

    def __init__(self, folder: Path, *command: str) -> None:
        model = light_repository(folder / "models") / "light"
        config = WorkerConfig(
            *(model, ModelConfig("light"), "1", "light-0", folder / "socket"),
            device="cpu",
            threads=1,
            fallback=FallbackPolicy.EAGER,
            patience=PATIENCE,
            start_patience=PATIENCE,
        )
        self._changed = asyncio.Event()
        self.worker = Worker(config, lambda _: self._changed.set(), command)

    async def until(self, state: WorkerState, why: str = "") -> None:
        async with asyncio.timeout(PATIENCE):
            while self.worker.state is not state or why not in self.worker.reason:
                self._changed.clear()
                await self._changed.wait()


async def replaced(server: Running) -> None:
    """Kills the only process and waits until there is another."""
    (worker,) = server.workers
    before = worker.pid
    os.kill(before or 0, signal.SIGKILL)
    await server.until(lambda: worker.pid not in (before, None) and worker.state is WorkerState.READY)


def held(gate: Path) -> GenerationRequest:
    return replace(a_request(), model="light", prompt=str(gate))


async def test_a_worker_stays_while_the_frontend_does(server: Running) -> None:
    """It reads its standard input to learn that the frontend is gone: nobody may close that before."""
    (worker,) = server.workers
    pid = worker.pid
    for _ in range(2):
        heard = worker.info
        await server.until(lambda heard=heard: worker.info is not heard)
    assert (worker.pid, worker.state, worker.restarts) == (pid, WorkerState.READY, 0)


async def test_a_model_may_have_more_policies_than_a_command_line_holds(tmp_path: Path) -> None:
    """Linux takes 128 KiB an argument."""
    most = 3000
    policies = (f"priority_queue_policy {{ key: {n} value {{ max_queue_size: {n} }} }}" for n in range(1, most + 1))
    config = f"dynamic_batching {{ priority_levels: {most} {' '.join(policies)} }}"
    async with serving(light_repository(tmp_path / "models", config), LIGHT) as server:
        assert server.queue.ready, server.queue.reason
        drawn = await draw(server.client, ImageRequest("a cat", width=64, height=64, priority=most))
        assert drawn.of("completed")
        assert server.queue.config.queue.of(most).max_size == most


async def test_a_worker_that_is_slow_to_serve_is_looked_for_often(tmp_path: Path) -> None:
    attempts: asyncio.Queue[float] = asyncio.Queue()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        attempts.put_nowait(asyncio.get_running_loop().time())
        writer.close()

    client = ImageGenerationClient(f"unix:{tmp_path}/socket")
    async with await asyncio.start_unix_server(refuse, tmp_path / "socket"):
        looking = asyncio.create_task(client.instance())
        times = [await attempts.get() for _ in range(6)]
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    await client.close()
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert (
        min(pauses[2:]) < 1.0
    )  # of several, since a busy machine adds to each; gRPC's own are 2.5, 4 and 6.5 s by now


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_call_that_is_open_when_its_channel_closes_has_lost_its_worker(cancelled: bool) -> None:
    """And is not taken for cancelled, which would end its request without an answer."""
    images = FakeImages(1, None)
    async with images.serving() as address:
        client = ImageGenerationClient(address)
        events = client.generate(a_request())
        await anext(events)
        calling = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        if cancelled:
            calling.cancel()
        await client.close(0.01)
        with pytest.raises(asyncio.CancelledError if cancelled else WorkerLostError):
            await calling


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_worker_that_ends_a_call_is_lost(status: grpc.StatusCode) -> None:
    """As gRPC does for it, in either way, when it is told to stop."""
    async with FakeImages(1, status).serving() as address:
        client = ImageGenerationClient(address)
        with pytest.raises(WorkerLostError, match="ended while it had the request"):
            async for _ in client.generate(a_request()):
                pass
        await client.close()


async def test_of_what_a_worker_prints_the_end_is_kept() -> None:
    stream = asyncio.StreamReader()
    for line in range(10_000):
        stream.feed_data(b"line %d\n" % line)
    stream.feed_eof()
    kept = await _end_of(stream)
    assert len(kept) == KEPT_BYTES
    assert kept.endswith(b"line 9998\nline 9999\n")


async def test_a_call_that_outlived_its_process_does_not_end_the_next(server: Running, tmp_path: Path) -> None:
    (worker,) = server.workers
    events = worker.generate(held(tmp_path / "never"))
    assert isinstance(await anext(events), Started)
    await replaced(server)
    pid = worker.pid
    with pytest.raises(WorkerLostError):
        await anext(events)
    assert (worker.pid, worker.state, worker.restarts) == (pid, WorkerState.READY, 1)


async def test_a_slow_reader_whose_worker_was_replaced_does_not_end_the_next(server: Running, tmp_path: Path) -> None:
    (worker,) = server.workers
    slow = Serving(server.queue, held(tmp_path / "gate"), max_retries=3, metrics=Metrics()).events()
    while not isinstance(await anext(slow), Started):
        pass
    await replaced(server)
    pid = worker.pid
    (tmp_path / "gate").touch()
    assert [e.attempt async for e in slow if isinstance(e, Started)] == [2]
    assert (worker.pid, worker.state, worker.restarts) == (pid, WorkerState.READY, 1)


async def test_a_worker_that_is_stopped_amid_a_step_ends_as_it_should(repository: Path, tmp_path: Path) -> None:
    """Neither killed for the call that it breaks off, nor aborted by the step that is still under way."""
    config = 'parameters { key: "default_size" value { string_value: "64x64" } }'
    models = make_repository(repository / MODEL, tmp_path / "models", config)
    async with serving(models, exit_timeout_secs=0.0) as server:
        seen = Seen()
        endless = ImageRequest("a red circle", width=512, height=512, num_inference_steps=50)
        drawing = asyncio.create_task(draw(server.client, endless, seen))
        await server.until(lambda: seen.of("progress"))
        process = server.workers[0]._current
        assert process is not None
    assert process.process.returncode == 0
    assert "UNAVAILABLE" in str((await asyncio.gather(drawing, return_exceptions=True))[0])


@pytest.mark.parametrize("told", [(), ((WAITED, "0"),)])
async def test_a_worker_says_that_a_request_has_reached_it_to_a_frontend(
    server: Running, tmp_path: Path, told: tuple[tuple[str, str], ...]
) -> None:
    async with grpc.aio.insecure_channel(f"unix:{server.workers[0].config.socket}") as channel:
        stub: Any = pb_grpc.ImageGenerationStub(channel)
        call = stub.Generate(encode_request(held(tmp_path / "never")), metadata=told)
        assert (REACHED in await call.initial_metadata()) is bool(told)


async def test_a_request_that_comes_upon_ended_workers_is_not_to_blame(tmp_path: Path) -> None:
    models = light_repository(tmp_path / "models", "instance_group { count: 2 kind: KIND_CPU }")
    async with serving(models, LIGHT) as server:
        for worker in server.workers:
            os.kill(worker.pid or 0, signal.SIGKILL)
        assert (await draw(server.client, ImageRequest("x"))).kinds[-1] == "completed"


async def test_tritons_requests_wait_too_while_the_only_worker_is_replaced(server: Running) -> None:
    (worker,) = server.workers
    prompt = triton.InferInput("PROMPT", [1], "BYTES").set_data_from_numpy(np.array([b"x"], dtype=object))
    async with triton.InferenceServerClient(server.url) as client:
        os.kill(worker.pid or 0, signal.SIGKILL)
        await server.until(lambda: worker.state is WorkerState.RESTARTING)
        assert not await client.is_model_ready("light")
        image = await client.infer("light", [prompt], parameters={"width": 64, "height": 64})
        assert image.as_numpy("IMAGE").shape == (64, 64, 3)
        assert await client.is_model_ready("light")


async def test_a_worker_that_cannot_be_started_again_is_tried_until_it_can(tmp_path: Path) -> None:
    starter = tmp_path / "starter"

    def install() -> None:
        starter.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *LIGHT[1:]])} "$@"\n')
        starter.chmod(0o755)

    install()
    alone = Alone(tmp_path, str(starter))
    alone.worker.start()
    await alone.until(WorkerState.READY)
    starter.unlink()
    os.kill(alone.worker.pid or 0, signal.SIGKILL)
    await alone.until(WorkerState.RESTARTING, "could not be started")
    install()
    await alone.until(WorkerState.READY)
    await alone.worker.stop()


async def test_a_worker_that_was_ready_again_is_replaced_as_soon_as_the_first_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And later and later, up to a limit, while it is not."""
    script = f"""
    echo >> {tmp_path}/starts
    case $(wc -l < {tmp_path}/starts) in 2|3|4) exit 1;; esac
    exec {shlex.join([sys.executable, *LIGHT[1:]])} "$@"
    """
    monkeypatch.setattr(workers, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(workers, "LONGEST_BACKOFF", 0.05)
    alone = Alone(tmp_path, "sh", "-c", script, "light")
    alone.worker.start()
    await alone.until(WorkerState.READY)
    for restarts in (4, 5):
        os.kill(alone.worker.pid or 0, signal.SIGKILL)
        await alone.until(WorkerState.RESTARTING)
        await alone.until(WorkerState.READY)
        assert alone.worker.restarts == restarts
    await alone.worker.stop()
    assert re.findall(r"starting another in (\S+) s", caplog.text) == ["0.01", "0.02", "0.04", "0.05", "0.01"]


async def test_a_worker_is_replaced_though_its_child_holds_its_standard_output(tmp_path: Path) -> None:
    """What has ended is known by the end of its output, which a child has too."""
    script = f'sleep {2 * PATIENCE} & exec {shlex.join([sys.executable, *LIGHT[1:]])} "$@"'
    alone = Alone(tmp_path, "sh", "-c", script, "light")
    alone.worker.start()
    await alone.until(WorkerState.READY)
    os.kill(alone.worker.pid or 0, signal.SIGKILL)
    await alone.until(WorkerState.RESTARTING, "was ended by SIGKILL")
    await alone.until(WorkerState.READY)
    assert alone.worker.restarts == 1
    await alone.worker.stop()


async def test_a_child_of_a_worker_that_ends_just_before_it_is_stopped_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'sleep {2 * PATIENCE} & echo $! > {tmp_path}/child; exec {shlex.join([sys.executable, *LIGHT[1:]])} "$@"'
    alone = Alone(tmp_path, "sh", "-c", script, "light")
    monkeypatch.setattr(workers, "LOOK_EVERY", 2 * PATIENCE)  # so it is not noticed before
    alone.worker.start()
    await alone.until(WorkerState.READY)
    child = psutil.Process(int((tmp_path / "child").read_text()))
    process = alone.worker._current.process if alone.worker._current else None
    assert process is not None
    process.kill()
    async with asyncio.timeout(PATIENCE):
        while process.returncode is None:  # noqa: ASYNC110 - asyncio has no event for it
            await asyncio.sleep(0.01)
    await alone.worker.stop()
    await asyncio.to_thread(wait_for, lambda: is_gone(child))


async def test_a_worker_that_sigkill_does_not_end_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a driver does not return: nobody could load the model again, and the server would never end."""
    alone = Alone(tmp_path, *SLEEPS)
    alone.worker.start()
    stuck = psutil.Process(await asyncio.to_thread(wait_for, lambda: alone.worker.pid))
    stuck.suspend()
    await asyncio.to_thread(wait_for, lambda: stuck.status() == psutil.STATUS_STOPPED)  # SIGTERM must not come first
    with monkeypatch.context() as driver:
        driver.setattr(workers, "KILL_AFTER", 0.05)
        driver.setattr(_Process, "kill", lambda process: None)
        await alone.worker.stop()
    assert f"process {stuck.pid} is left behind" in caplog.text
    stuck.kill()
    await alone.worker.stop()  # sees that it has ended


async def test_a_worker_that_has_ended_has_no_number_any_more(tmp_path: Path) -> None:
    """The system may have given it to another process, which is not to be ended in its place."""
    alone = Alone(tmp_path, "false")
    alone.worker.start()
    await alone.until(WorkerState.FAILED)
    assert alone.worker.pid is None
    await alone.worker.stop()


async def test_a_worker_that_ends_by_a_signal_without_a_name_is_replaced(tmp_path: Path) -> None:
    alone = Alone(tmp_path, *LIGHT)
    alone.worker.start()
    await alone.until(WorkerState.READY)
    os.kill(alone.worker.pid or 0, signal.SIGRTMIN + 1)
    await alone.until(WorkerState.RESTARTING, f"was ended by signal {signal.SIGRTMIN + 1}")
    await alone.until(WorkerState.READY)
    await alone.worker.stop()


async def test_a_worker_for_which_there_is_no_thread_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio's child watcher of Python 3.11 begins one for each process."""
    start = asyncio.create_subprocess_exec
    lacking = [RuntimeError("can't start new thread")]

    async def start_or_not(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        if alone.worker.info is not None and lacking:
            raise lacking.pop()
        return await start(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_or_not)
    alone = Alone(tmp_path, *LIGHT)
    alone.worker.start()
    await alone.until(WorkerState.READY)
    os.kill(alone.worker.pid or 0, signal.SIGKILL)
    await alone.until(WorkerState.RESTARTING, "can't start new thread")
    await alone.until(WorkerState.READY)
    await alone.worker.stop()


async def test_a_worker_that_could_never_be_started_has_failed(tmp_path: Path) -> None:
    alone = Alone(tmp_path, str(tmp_path / "nothing"))
    alone.worker.start()
    await alone.until(WorkerState.FAILED, "could not be started")
    await alone.worker.stop()


HALF = """
import os, pathlib, sys, time
if '"version": "2"' in sys.argv[1] and '"instance": "light-1"' in sys.argv[1]:
    gate = pathlib.Path(os.environ["GATE"])
    while not gate.exists():
        time.sleep(0.02)
    sys.exit("no memory for a second one")
os.execv(sys.executable, [sys.executable, "-m", "tests.integration.light_worker", *sys.argv[1:]])
"""


async def test_a_version_that_is_half_loaded_takes_nothing_from_one_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may still fail, and who had been given to it would fail with it."""
    failing, gate = tmp_path / "failing", tmp_path / "gate"
    monkeypatch.setenv("GATE", str(failing))
    models = light_repository(tmp_path / "models", "instance_group { count: 2 kind: KIND_CPU }")
    options = {"model_control_mode": ControlMode.EXPLICIT, "load_model": ("light",)}
    async with serving(models, (sys.executable, "-c", HALF), **options) as server:
        (models / "light" / "2").mkdir()
        (models / "light" / "2" / "weights").touch()
        loading = asyncio.create_task(server.frontend._repository.load("light"))
        await server.until(
            lambda: any(w.config.version == "2" and w.info for q in server.frontend.queues for w in q.workers)
        )
        drawing = asyncio.create_task(draw(server.client, ImageRequest(str(gate), model="light")))
        await server.until(lambda: server.queue.running == 1)
        failing.touch()
        with pytest.raises(EngineLoadError, match="light-1: exited with status 1"):
            await loading
        gate.touch()
        assert (await drawing).kinds[-1] == "completed"


async def test_a_worker_that_is_replaced_has_the_config_that_was_loaded(tmp_path: Path) -> None:
    """What was written since is not accepted before it is loaded, and may not even be a config."""
    models = light_repository(tmp_path / "models")
    async with serving(models, LIGHT) as server:
        (models / "light" / "config.pbtxt").write_text("nonsense")
        os.kill(server.workers[0].pid or 0, signal.SIGKILL)
        await server.until(lambda: server.workers[0].restarts == 1 and server.workers[0].state is WorkerState.READY)
        assert (await draw(server.client, ImageRequest("x"))).kinds[-1] == "completed"


SLEEPS = (sys.executable, "-c", "import time; time.sleep(600)")


async def test_a_worker_that_hangs_as_it_starts_is_given_up(tmp_path: Path) -> None:
    alone = Alone(tmp_path, *SLEEPS)
    alone.worker.config = replace(alone.worker.config, start_patience=0.5)
    alone.worker.start()
    await alone.until(WorkerState.FAILED, "is given up: it did not answer within 0.5 s")
    await alone.worker.stop()


async def test_an_unload_ends_workers_that_are_starting(tmp_path: Path) -> None:
    """They would take requests as soon as they are there, though nobody wants them any more."""
    gate = tmp_path / "gate"
    models = light_repository(tmp_path / "models")
    options = {"model_control_mode": ControlMode.EXPLICIT, "load_model": ("light",)}
    async with serving(models, LIGHT, **options) as server:
        drawing = asyncio.create_task(draw(server.client, ImageRequest(str(gate))))
        await server.until(lambda: server.queue.running == 1)
        (models / "light" / "config.pbtxt").write_text("# changed")
        loading = asyncio.create_task(server.frontend._repository.load("light"))
        await server.until(lambda: server.frontend.queues[-1] is not server.queue)
        (starting,) = server.frontend.queues[-1].workers
        server.frontend._repository.unload_soon("light")
        with pytest.raises(OvertakenError):
            await loading
        assert starting.state is WorkerState.STOPPED
        with pytest.raises(GenerationFailedError, match="this server has: none"):
            await draw(server.client, ImageRequest("x"))
        gate.touch()
        assert (await drawing).kinds[-1] == "completed"


async def test_the_counters_of_rare_events_are_there_before_the_first(server: Running) -> None:
    """What begins with 1 is no increase to Prometheus."""
    text = await asyncio.to_thread(render, server.frontend._metrics.registry)
    for name in (
        'zserve_request_retries_total{model="light"}',
        'zserve_poison_requests_total{model="light"}',
        'zserve_previews_total{model="light"}',
        "zserve_traces_lost_total",
        'zserve_requests_total{model="light",outcome="internal"}',
        'zserve_prompt_cache_lookups_total{model="light",result="hit"}',
    ):
        assert f"\n{name} 0\n" in text
    assert "zserve_response_cache_lookups_total{" not in text  # it has none


async def test_traces_that_are_lost_are_counted(tmp_path: Path) -> None:
    level = frozenset({TraceLevel.TIMESTAMPS})
    trace = TraceSettings(level, trace_rate=1, trace_file=str(tmp_path))  # a folder
    async with serving(light_repository(tmp_path / "models"), LIGHT, trace=trace) as server:
        await draw(server.client, ImageRequest("x"))
        registry = server.frontend._metrics.registry
        assert await asyncio.to_thread(wait_for, lambda: "\nzserve_traces_lost_total 1" in render(registry))


async def test_no_series_is_told_twice(tmp_path: Path) -> None:
    """Of what is there more than once in an answer, Prometheus keeps one."""
    models = light_repository(tmp_path / "models", "version_policy { all {} }")
    (models / "light" / "2").mkdir()
    async with serving(models, LIGHT) as server:
        text = await asyncio.to_thread(render, server.frontend._metrics.registry)
    series = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert {'version="1"', 'version="2"'} <= set(re.findall(r'version="\d"', "".join(series)))
    assert [one for one, times in Counter(series).items() if times > 1] == []
