"""The server's life: health, readiness, fallback, shutdown."""

import json
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import grpc
import onnx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from client import GenerationFailedError, ImageRequest
from export.manifest import FileRecord
from tests.conftest import MODEL, copy_model
from tests.integration.process import PATIENCE, ServerProcess, is_gone, wait_for

PROMPT = "a red circle on a white background"
# Minutes of work on two cores: it does not end by itself while a test looks at it.
ENDLESS = {"width": 1024, "height": 1024, "num_inference_steps": 50, "num_images": 4}
THREE_STEPS = {"width": 64, "height": 64, "num_inference_steps": 3}
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """A repository that a test may break: its model's only version is 1."""
    return copy_model(repository, tmp_path / "models").parent


def check(url: str, service: str = "") -> int:
    with grpc.insecure_channel(url) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(
            stub.Check(health_pb2.HealthCheckRequest(service=service), wait_for_ready=True, timeout=PATIENCE).status
        )


def test_health_and_reflection(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.url) as channel:
        services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"zserve.v1.ImageGeneration", "inference.GRPCInferenceService", "grpc.health.v1.Health"} <= services
    assert {check(server.url, name) for name in ("", *services)} == {SERVING}
    with pytest.raises(grpc.RpcError) as caught:
        check(server.url, "no.such.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_ready_means_warmed_and_health_answers_before_and_watchers_are_told(copy: Path) -> None:
    server = ServerProcess(copy)
    with server.standing_still() as worker:
        assert check(server.url) == NOT_SERVING
        with (
            server.client() as client,
            pytest.raises(GenerationFailedError, match=r"UNAVAILABLE: .*loading and warming up"),
        ):
            client.draw(PROMPT)
        with grpc.insecure_channel(server.url) as channel:
            watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            assert next(watched).status == NOT_SERVING
            worker.resume()
            assert next(watched).status == SERVING
    with server.client() as client:
        assert client.draw(PROMPT, num_inference_steps=1).images
        assert client.model().instances[0].step_costs
    assert server.stop() == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_told_to_stop_it_finishes_what_runs_and_takes_nothing_new(copy: Path, how: signal.Signals) -> None:
    outcomes: list[int] = []

    def draw() -> None:
        with server.client() as client:
            outcomes.append(len(client.draw(PROMPT, num_inference_steps=4).images))

    with ServerProcess(copy, "--exit-timeout-secs", str(PATIENCE), "--log-format", "ISO8601") as server:
        assert re.search(rf"^\S+T\S+ INFO {MODEL}-0 __main__: ready after", server.log, re.MULTILINE), "a worker's"
        drawing = [threading.Thread(target=draw) for _ in range(3)]
        with server.standing_still() as worker:
            for thread in drawing:
                thread.start()
            wait_for(lambda: server.metric("zserve_requests_under_way", model=MODEL) == 3)
            server.process.send_signal(how)
            wait_for(lambda: "shutting down" in server.log)
            with server.client() as late, pytest.raises(GenerationFailedError, match=r"UNAVAILABLE.*shutting down"):
                late.draw(PROMPT)
        for thread in drawing:
            thread.join(PATIENCE)
        assert outcomes == [1, 1, 1]
        assert server.ended() == 0
    assert not worker.is_running()


def test_told_to_stop_while_it_loads_it_leaves_no_worker(copy: Path) -> None:
    server = ServerProcess(copy)
    worker = wait_for(server.workers)[0]
    worker.suspend()  # it would not end by itself
    assert server.stop() == 0
    assert not worker.is_running()


def test_a_killed_worker_is_replaced_and_does_not_outlive_a_killed_frontend(copy: Path) -> None:
    with ServerProcess(copy) as server, server.client() as client:
        (worker,) = server.workers()
        events = client.generate(ImageRequest(PROMPT, width=1024, height=1024, num_inference_steps=50))
        next(e for e in events if e.HasField("progress"))
        worker.kill()
        assert next(e.started.attempt for e in events if e.HasField("started")) == 2
        events.close()
        assert client.draw(PROMPT, num_inference_steps=1).images
        assert server.metric("zserve_worker_restarts_total", model=MODEL) == 1
        (replacement,) = server.workers()
        server.stop(signal.SIGKILL)
        wait_for(lambda: is_gone(replacement))


def test_a_worker_that_loads_ends_with_a_killed_frontend_and_says_nothing(copy: Path) -> None:
    """The next server may be loading already, on the same device."""
    server = ServerProcess(copy)
    worker = wait_for(server.workers)[0]
    server.stop(signal.SIGKILL)
    wait_for(lambda: is_gone(worker))
    assert "Traceback" not in server.log


def test_a_full_queue_refuses_and_what_does_not_finish_in_time_is_answered(copy: Path) -> None:
    config = copy / MODEL / "config.pbtxt"
    limits = "dynamic_batching { default_queue_policy { max_queue_size: 2 } }"
    config.write_text(config.read_text() + limits)
    with ServerProcess(copy, "--exit-timeout-secs", "0.5") as server, server.client() as client:
        calls = [client.generate(ImageRequest(PROMPT, seed=s, **ENDLESS)) for s in range(4)]
        positions = [next(call).queued.position for call in calls]
        assert positions == [0, 0, 1, 2]  # one runs, the second is next at the worker, two wait
        with pytest.raises(GenerationFailedError, match=r"RESOURCE_EXHAUSTED.*max_queue_size 2 is reached"):
            client.draw(PROMPT)
        first, *others = calls
        for call in others:
            call.close()
        assert client.draw(PROMPT, num_inference_steps=1, priority=1).images
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(GenerationFailedError, match=r"UNAVAILABLE.*shut down before"):
            list(first)
        assert server.ended() == 0
        assert "Traceback" not in server.log


def manifest_of(repository: Path) -> Path:
    return repository / MODEL / "1" / "manifest.json"


def make_stale(repository: Path, component: str) -> None:
    path = manifest_of(repository)
    raw = json.loads(path.read_text())
    (engine,) = (e for e in raw["engines"] if e["component"] == component)
    engine["built_with"] = {"onnxruntime": "0.1"}
    path.write_text(json.dumps(raw))


def test_a_stale_engine_falls_back_and_says_so_everywhere(copy: Path) -> None:
    make_stale(copy, "image_decoder")
    with ServerProcess(copy) as server, server.client() as client:
        completed = client.draw(PROMPT, num_inference_steps=1).completed
        for engines in (completed.engines, client.model().instances[0].engines):
            assert [use.backend for use in engines] == ["onnxruntime", "onnxruntime", "eager"]
            assert "was built with onnxruntime 0.1" in engines[2].fallback_reason
            assert "zserve export" in engines[2].fallback_reason
        assert server.metric("zserve_engine_fallback_total", component="image_decoder", backend="eager") == 1
        assert server.metric("zserve_engine_info", component="image_decoder", backend="eager") == 1
        assert server.log.count("image_decoder falls back to eager") == 1


def test_require_engine_refuses_to_start_instead(copy: Path) -> None:
    make_stale(copy, "image_decoder")
    server = ServerProcess(copy, "--require-engine")
    assert server.ended() == 1
    assert "was built with onnxruntime 0.1" in server.log
    assert "--require-engine" in server.log


def poison_weights(repository: Path, name: str) -> None:
    """Turns every weight of an engine into NaN and lets the manifest agree."""
    path = repository / MODEL / "1" / f"{name}.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) >= 2:
            tensor.raw_data = b"\xff" * len(tensor.raw_data)
    onnx.save(model, path)
    raw = json.loads(manifest_of(repository).read_text())
    for engine in raw["engines"]:
        if engine["component"] == name:
            engine["files"] = [asdict(FileRecord.of(path))]
    manifest_of(repository).write_text(json.dumps(raw))


@pytest.mark.parametrize("wrong", [{"denoiser"}, {"prompt_encoder", "image_decoder"}], ids=len)
def test_an_engine_that_goes_wrong_is_quarantined_and_the_request_succeeds(
    copy: Path, server: ServerProcess, wrong: set[str]
) -> None:
    with server.client() as client:
        expected = client.draw(PROMPT, seed=5, **THREE_STEPS).images[0].pillow()
    for component in wrong:
        poison_weights(copy, component)
    with ServerProcess(copy) as poisoned, poisoned.client() as client:
        drawing = client.draw(PROMPT, seed=5, **THREE_STEPS)
        for use in drawing.completed.engines:
            assert use.backend == ("eager" if use.component in wrong else "onnxruntime")
            assert ("not finite" in use.fallback_reason) is (use.component in wrong)
        difference = [abs(a - b) for a, b in zip(drawing.images[0].pillow().tobytes(), expected.tobytes(), strict=True)]
        assert max(difference) <= 1
        for component in wrong:
            wait_for(lambda c=component: poisoned.metric("zserve_engine_info", component=c, backend="eager"))
        assert poisoned.log.count("quarantined") == len(wrong)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: p / "missing", "no model repository at"),
        (lambda p: p, "is empty; fill it with `zserve export"),
        (lambda p: (p / "m").mkdir() or p, "holds no version; finish its export with"),
    ],
)
def test_a_repository_that_cannot_be_served_is_said_at_once(tmp_path: Path, prepare: object, message: str) -> None:
    server = ServerProcess(prepare(tmp_path), "--exit-on-error")  # type: ignore[operator]
    assert server.ended() == 1
    assert message in server.log


def test_a_port_in_use_is_said(server: ServerProcess, repository: Path) -> None:
    second = ServerProcess(repository, "--grpc-port", server.url.rpartition(":")[2])
    assert second.ended() == 1
    assert "cannot listen on" in second.log
    assert "--grpc-port" in second.log


def test_a_port_in_use_for_metrics_is_said_and_nothing_else(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        second = ServerProcess(repository, "--metrics-address", "127.0.0.1", "--metrics-port", str(port))
        assert second.ended() == 1
    assert f"no metrics at --metrics-address 127.0.0.1, --metrics-port {port}: " in second.log
    assert "Traceback" not in second.log


def test_a_changed_checkpoint_is_not_mixed_with_old_engines(copy: Path) -> None:
    path = manifest_of(copy)
    raw = json.loads(path.read_text())
    raw["checkpoint"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(raw))
    server = ServerProcess(copy)
    assert server.ended() == 1
    assert "has changed since" in server.log


def test_health_answers_while_the_device_works(server: ServerProcess) -> None:
    """Nothing in the frontend waits for the device: with a worker that does nothing at all, everything is answered."""
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        with server.standing_still():
            drawing = pool.submit(client.draw, PROMPT, num_inference_steps=1)
            wait_for(lambda: server.metric("zserve_running_requests", model=MODEL) == 1)
            assert check(server.url) == SERVING
            assert client.model(MODEL).ready
            assert not drawing.done()
        assert drawing.result(PATIENCE).images
