"""Versions, loading and unloading: explicit, by polling, and with a model that cannot be loaded."""

import asyncio
import json
import queue
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc

from server.config import ControlMode, ServeConfig
from server.frontend.app import Frontend
from server.frontend.repository import Repository
from server.settings import GrpcConfig
from tests.conftest import MODEL, copy_model
from tests.integration.process import PATIENCE, ServerProcess, wait_for
from tests.integration.triton.conftest import IDENTITIES, bytes_tensor, identity_config, some_bytes, tensor, write_model
from tests.integration.triton.test_errors import status_of

Start = Callable[..., ServerProcess]


def states(client: triton.InferenceServerClient) -> dict[tuple[str, str], str]:
    return {(m.name, m.version): m.state for m in client.get_model_repository_index().models}


def readiness(server: ServerProcess) -> dict[str, int]:
    """`zserve_model_ready` of each model that has it."""
    found = re.findall(r'^zserve_model_ready{model="(.*)"} (\d)$', server.metrics(), re.MULTILINE)
    return {name: int(value) for name, value in found}


def test_load_and_unload(identity_server: Start, tmp_path: Path) -> None:
    server = identity_server("--model-control-mode", "explicit")
    with triton.InferenceServerClient(server.url) as client:
        assert states(client) == {("identity", ""): ""}
        assert client.is_server_ready()
        client.load_model("identity")
        assert states(client) == {("identity", "1"): "READY"}
        assert client.is_model_ready("identity")
        assert readiness(server) == {"identity": 1}
        client.unload_model("identity")
        wait_for(lambda: states(client) == {("identity", "1"): "UNAVAILABLE"})
        assert readiness(server) == {}
        assert status_of(lambda: client.infer("identity", [some_bytes()]))[0] == "NOT_FOUND"
        client.load_model("identity")
        assert client.infer("identity", [some_bytes()]).as_numpy("OUTPUT0").size == 5
        for name in ("x", "identity", "identity"):  # what is not loaded may be unloaded: scripts tidy up like that
            client.unload_model(name)
        wait_for(lambda: states(client) == {("identity", "1"): "UNAVAILABLE"})
        for name in ("x", "", "../models/identity"):
            assert status_of(lambda name=name: client.load_model(name))[0] == "NOT_FOUND"
        assert client.is_server_ready()


class Drawing:
    """Clients that draw one image after the other, and what version answered each; an error ends it all."""

    def __init__(self, server: ServerProcess) -> None:
        self.server, self.stop = server, threading.Event()
        self.versions: list[str] = []
        self.images = 0

    def tensors(self) -> None:
        parameters = {"num_inference_steps": 1, "width": 64, "height": 64}
        with triton.InferenceServerClient(self.server.url) as client:
            while not self.stop.is_set():
                result = client.infer(MODEL, [bytes_tensor("PROMPT", "a star")], parameters=parameters)
                assert result.as_numpy("IMAGE").shape == (64, 64, 3)
                self.versions.append(result.get_response().model_version)

    def one(self) -> int:
        with self.server.client() as client:
            return len(client.draw("a star", width=64, height=64, num_inference_steps=1).images)

    def stream(self) -> None:
        while not self.stop.is_set():
            self.images += self.one()


def test_a_version_is_replaced_and_unloaded_without_a_failed_request(repository: Path, tmp_path: Path) -> None:
    model = copy_model(repository, tmp_path)
    arguments = ("--model-control-mode", "explicit", "--load-model", MODEL)
    with ServerProcess(tmp_path, *arguments) as server, ThreadPoolExecutor(4) as pool:
        (old,) = server.workers()
        drawing = Drawing(server)
        clients = [pool.submit(work) for work in (drawing.tensors, drawing.tensors, drawing.stream, drawing.stream)]
        try:
            wait_for(lambda: drawing.images > 3 and len(drawing.versions) > 3)
            shutil.copytree(model / "1", tmp_path / "2")
            (tmp_path / "2").rename(model / "2")
            with triton.InferenceServerClient(server.url) as client:
                client.load_model(MODEL)
                assert states(client) == {(MODEL, "1"): "UNAVAILABLE", (MODEL, "2"): "READY"}
            images = drawing.images
            wait_for(lambda: drawing.images > images + 3 and drawing.versions.count("2") > 3)
        finally:
            drawing.stop.set()
        for client in clients:
            client.result(PATIENCE)  # none has failed
        assert set(drawing.versions) == {"1", "2"}
        assert not old.is_running()
        assert len(server.workers()) == 1
        assert server.metric("zserve_worker_restarts_total", model=MODEL) == 0
        with server.standing_still(), triton.InferenceServerClient(server.url) as client:
            last = pool.submit(drawing.one)
            wait_for(lambda: server.metric("zserve_running_requests", model=MODEL) == 1)
            client.unload_model(MODEL)
            assert states(client) == {(MODEL, "1"): "UNAVAILABLE", (MODEL, "2"): "UNLOADING"}
        assert last.result(PATIENCE) == 1
        wait_for(lambda: not server.workers())


def test_what_is_loaded_anew_answers_nothing_from_the_old_ones_cache(repository: Path, tmp_path: Path) -> None:
    """The version's number is the same; its weights may be others."""
    model = copy_model(repository, tmp_path)
    config = (model / "config.pbtxt").read_text() + "\nresponse_cache { enable: true }\n"
    (model / "config.pbtxt").write_text(config)
    with (
        ServerProcess(tmp_path, "--model-control-mode", "explicit", "--load-model", MODEL) as server,
        triton.InferenceServerClient(server.url) as operator,
        server.client() as client,
    ):

        def cached() -> bool:
            drawing = client.draw("a star", seed=1, width=64, height=64, num_inference_steps=1)
            return drawing.completed.response_cached

        assert [cached(), cached()] == [False, True]
        (model / "config.pbtxt").write_text(config + "\n")
        operator.load_model(MODEL)
        assert [cached(), cached()] == [False, True]


def test_a_request_under_way_outlives_its_unloading(identity_server: Start) -> None:
    server = identity_server("--model-control-mode", "explicit", "--load-model", "identity")
    with triton.InferenceServerClient(server.url) as client:
        results: queue.Queue[triton.InferResult] = queue.Queue()
        client.async_infer(
            "identity", [some_bytes()], lambda result, error: results.put(result), parameters={"execute_delay_ms": 3000}
        )
        wait_for(lambda: server.metric("zserve_requests_under_way", model="identity") == 1)
        client.unload_model("identity")
        assert states(client) == {("identity", "1"): "UNLOADING"}
        for version in ("", "1"):
            status, text = status_of(lambda v=version: client.infer("identity", [some_bytes()], model_version=v))
            assert (status, "is not at ready state" in text) == ("UNAVAILABLE", True)
        assert results.get(timeout=60).as_numpy("OUTPUT0").size == 5


def test_a_config_given_with_the_load(identity_server: Start) -> None:
    server = identity_server("--model-control-mode", "explicit")
    config = {
        "backend": "identity",
        "input": [{"name": "A", "data_type": "TYPE_FP32", "dims": [2]}],
        "output": [{"name": "B", "data_type": "TYPE_FP32", "dims": [2]}],
    }
    with triton.InferenceServerClient(server.url) as client:
        client.load_model("identity", config=json.dumps(config))
        values = np.array([1, 2], dtype=np.float32)
        assert client.infer("identity", [tensor("A", values, "FP32")]).as_numpy("B").tolist() == [1, 2]
        assert client.get_model_config("identity").config.input[0].name == "A"
        for bad in ("{", "[]", "null", "1", '"x"', " "):
            assert status_of(lambda c=bad: client.load_model("identity", config=c))[0] == "INVALID_ARGUMENT"
        files = {"file:7/model.bin": b"weights"}
        client.load_model("identity", config=json.dumps(config), files=files)
        assert states(client) == {("identity", "7"): "READY", ("identity", "1"): "UNAVAILABLE"}
        for name in ("file:../../x", "file:"):
            escape = {name: b""}
            status = status_of(lambda f=escape: client.load_model("identity", config=json.dumps(config), files=f))
            assert status[0] == "INVALID_ARGUMENT"
        assert client.infer("identity", [tensor("A", values, "FP32")]).get_response().model_version == "7"
        client.load_model("identity")  # as the repository has it
        assert states(client) == {("identity", "7"): "UNAVAILABLE", ("identity", "1"): "READY"}
        assert client.get_model_config("identity").config.input[0].name == "INPUT0"


def test_a_load_goes_on_when_its_client_has_left(repository: Path, tmp_path: Path) -> None:
    copy_model(repository, tmp_path)
    with ServerProcess(tmp_path, "--model-control-mode", "explicit") as server:
        with grpc.insecure_channel(server.url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            load = stub.RepositoryModelLoad.future(service_pb2.RepositoryModelLoadRequest(model_name=MODEL))
            with server.standing_still():
                load.cancel()
        with triton.InferenceServerClient(server.url) as client:
            wait_for(lambda: "READY" in states(client).values())
            assert client.is_server_ready()
        with server.client() as drawing:
            assert drawing.draw("a star", width=64, height=64, num_inference_steps=1).images


def test_nothing_is_loaded_by_clients_unless_that_was_allowed(identity_server: Start) -> None:
    with triton.InferenceServerClient(identity_server().url) as client:
        for call in (client.load_model, client.unload_model):
            status, text = status_of(lambda call=call: call("identity"))
            assert status == "UNAVAILABLE"
            assert text == "explicit model load / unload is not allowed if polling is enabled"


def test_version_policy(identity_server: Start, tmp_path: Path) -> None:
    policy = "version_policy {{ {} }}"
    versions = ("1", "2", "10")
    for name, choice in (("latest_two", "latest { num_versions: 2 }"), ("only", "specific { versions: [1, 2] }")):
        config = identity_config("TYPE_UINT8", extra=policy.format(choice))
        write_model(tmp_path / "models", name, config, versions)
    with triton.InferenceServerClient(identity_server().url) as client:
        assert list(client.get_model_metadata("latest_two").versions) == ["2", "10"]
        assert list(client.get_model_metadata("only").versions) == ["1", "2"]
        assert client.infer("latest_two", [some_bytes()]).get_response().model_version == "10"
        assert not [k for k in states(client) if k == ("latest_two", "1")]


def test_polling_follows_the_folders(identity_server: Start, tmp_path: Path) -> None:
    models = tmp_path / "models"
    server = identity_server("--model-control-mode", "poll", "--repository-poll-secs", "0.2")
    with triton.InferenceServerClient(server.url) as client:
        assert client.infer("identity", [some_bytes()]).get_response().model_version == "1"
        write_model(models, "identity", IDENTITIES["identity"], ("2",))
        wait_for(lambda: states(client).get(("identity", "2")) == "READY")
        wait_for(lambda: states(client).get(("identity", "1")) == "UNAVAILABLE")
        assert client.infer("identity", [some_bytes()]).get_response().model_version == "2"
        write_model(models, "another", IDENTITIES["identity"])
        wait_for(lambda: states(client).get(("another", "1")) == "READY")
        shutil.rmtree(models / "another")
        wait_for(lambda: ("another", "1") not in states(client))
        (models / "identity" / "config.pbtxt").write_text("not a config")
        wait_for(lambda: "failed" in server.log or "cannot load model identity" in server.log)
        assert client.infer("identity", [some_bytes()]).get_response().model_version == "2"


@pytest.mark.parametrize("broken", ["backend: 'nothing'", "not a config"])
def test_a_broken_model_is_named_and_the_others_serve(identity_server: Start, tmp_path: Path, broken: str) -> None:
    write_model(tmp_path / "models", "broken", broken)
    server = identity_server("--strict-readiness", "false")
    with triton.InferenceServerClient(server.url) as client:
        wait_for(lambda: client.is_model_ready("identity") or None)
        (entry,) = [m for m in client.get_model_repository_index().models if m.name == "broken"]
        assert entry.state == "UNAVAILABLE"
        assert readiness(server) == {"broken": 0, "identity": 1}
        assert "nothing" in entry.reason or "config.pbtxt cannot be read" in entry.reason
        assert client.infer("identity", [some_bytes()]).as_numpy("OUTPUT0").size == 5
        assert [m.name for m in client.get_model_repository_index().models] == ["broken", "identity"]


def test_a_name_at_the_start_that_has_no_folder_is_waited_for(identity_server: Start, tmp_path: Path) -> None:
    arguments = ("--model-control-mode=explicit", "--load-model=identity", "--load-model=later")
    server = ServerProcess(tmp_path / "models", *arguments)
    with triton.InferenceServerClient(server.url) as client:
        wait_for(lambda: "cannot load model later: it has no folder" in server.log)
        wait_for(lambda: client.is_model_ready("identity") or None)
        assert not client.is_server_ready()
        assert readiness(server) == {"identity": 1, "later": 0}
        write_model(tmp_path / "models", "later", IDENTITIES["identity"])
        client.load_model("later")
        wait_for(client.is_server_ready)
    assert server.stop() == 0


async def test_polling_survives_a_round_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rounds: asyncio.Queue[None] = asyncio.Queue()

    async def poll(repository: Repository) -> None:
        rounds.put_nowait(None)
        raise FileNotFoundError("it went while it was read")

    monkeypatch.setattr(Repository, "poll", poll)
    models = write_model(tmp_path, "identity", IDENTITIES["identity"]).parent
    grpc_config = GrpcConfig("127.0.0.1", port=0)
    poll_mode = {"model_control_mode": ControlMode.POLL, "repository_poll_secs": 0.01}
    config = ServeConfig(models, grpc=grpc_config, metrics_address="127.0.0.1", metrics_port=0, **poll_mode)
    with tempfile.TemporaryDirectory() as sockets:
        frontend = Frontend(config, Path(sockets))
        running = asyncio.create_task(frontend.run())
        for _ in range(2):
            await rounds.get()
        frontend.stop()
        assert await running == 0
    assert "it went while it was read" in caplog.text


def test_strict_readiness(tmp_path: Path) -> None:
    write_model(tmp_path, "identity", IDENTITIES["identity"])
    write_model(tmp_path, "broken", "backend: 'nothing'")
    server = ServerProcess(tmp_path)
    with triton.InferenceServerClient(server.url) as client:
        wait_for(lambda: "cannot load model broken" in server.log)
        wait_for(lambda: client.is_model_ready("identity") or None)
        assert not client.is_server_ready()
        assert client.is_server_live()
    assert server.stop() == 0


@pytest.mark.parametrize("arguments", [(), ("--exit-on-error",)])
def test_the_server_ends_when_it_has_nothing_to_serve(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    write_model(tmp_path, "broken", "backend: 'nothing'")
    if arguments:
        write_model(tmp_path, "identity", IDENTITIES["identity"])
    server = ServerProcess(tmp_path, *arguments)
    assert server.ended() == 1
    assert "cannot load model broken" in server.log
