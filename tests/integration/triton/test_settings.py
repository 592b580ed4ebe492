"""Trace and log settings, traces themselves, statistics."""

import json
import queue
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton
from google.protobuf import json_format

from tests.conftest import MODEL
from tests.integration.process import PATIENCE, ServerProcess, wait_for
from tests.integration.triton.conftest import bytes_tensor, some_bytes
from tests.integration.triton.test_errors import status_of

Start = Callable[..., ServerProcess]


def written(file: Path, count: int) -> list[dict[str, Any]]:
    """The records of a trace file, once there are `count`; one that is being made may still be empty."""

    def read() -> list[dict[str, Any]] | None:
        with suppress(FileNotFoundError, json.JSONDecodeError):
            records: list[dict[str, Any]] = json.loads(file.read_text())
            return records if len(records) == count else None
        return None

    return wait_for(read)


def test_traces(identity_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    server = identity_server(
        "--trace-config", "level=OFF", "--trace-config", "rate=2", "--trace-config", f"triton,file={file}"
    )
    with triton.InferenceServerClient(server.url) as client:
        client.infer("identity", [some_bytes()], request_id="untraced")
        changed = client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}, as_json=True)
        assert changed["settings"]["trace_level"]["value"] == ["TIMESTAMPS"]
        for number in range(4):
            client.infer("identity", [some_bytes()], request_id=f"r{number}")
    records = written(file, 4)
    assert [r["request_id"] for r in records if "request_id" in r] == ["r0", "r2"]
    points = {p["name"]: p["ns"] for p in records[1]["timestamps"]}
    assert list(points) == [
        "REQUEST_START",
        "QUEUE_START",
        "COMPUTE_START",
        "COMPUTE_INPUT_END",
        "COMPUTE_OUTPUT_START",
        "COMPUTE_END",
        "REQUEST_END",
        "GRPC_SEND_START",
        "GRPC_SEND_END",
    ]
    assert list(points.values()) == sorted(points.values())


def test_traces_of_tensors(identity_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    wanted = ("level=TENSORS", "rate=1", f"triton,file={file}")
    server = identity_server(*(part for setting in wanted for part in ("--trace-config", setting)))
    with triton.InferenceServerClient(server.url) as client:
        client.infer("identity", [some_bytes(3)])
        levels = client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS", "TENSORS"]}, as_json=True)
        assert levels["settings"]["trace_level"]["value"] == ["TENSORS", "TIMESTAMPS"]
        off = client.update_trace_settings(settings={"trace_level": ["OFF"]}, as_json=True)
        assert off["settings"]["trace_level"]["value"] == ["OFF"]
        assert status_of(lambda: client.update_trace_settings(settings={"trace_level": "MAX"}))[0] == "INVALID_ARGUMENT"
    assert written(file, 3)[1:] == [
        {"id": 1, "activity": activity, "tensor": {"name": name, "data": "0,1,2", "shape": "3", "dtype": "UINT8"}}
        for activity, name in (("TENSOR_QUEUE_INPUT", "INPUT0"), ("TENSOR_BACKEND_OUTPUT", "OUTPUT0"))
    ]


def test_traces_of_a_stream(identity_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    wanted = ("level=TIMESTAMPS", "rate=1", f"triton,file={file}")
    server = identity_server(*(part for setting in wanted for part in ("--trace-config", setting)))
    with triton.InferenceServerClient(server.url) as client:
        answers: queue.Queue[object] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(error))
        for name in ("r0", "r1"):
            client.async_stream_infer("identity", [some_bytes()], request_id=name)
        assert [answers.get(timeout=PATIENCE) for _ in range(2)] == [None, None]
        client.stop_stream()
    records = written(file, 4)
    assert sorted(r["request_id"] for r in records if "request_id" in r) == ["r0", "r1"]
    for record in (r for r in records if "timestamps" in r):
        points = {p["name"]: p["ns"] for p in record["timestamps"]}
        assert points["COMPUTE_END"] <= points["GRPC_SEND_START"] <= points["GRPC_SEND_END"] <= points["REQUEST_END"]


def test_trace_settings(identity_server: Start) -> None:
    with triton.InferenceServerClient(identity_server().url) as client:
        settings = client.update_trace_settings("identity", {"trace_rate": "5"}, as_json=True)["settings"]
        assert settings["trace_rate"]["value"] == ["5"]
        assert client.get_trace_settings(as_json=True)["settings"]["trace_rate"]["value"] == ["1000"]
        settings = client.update_trace_settings("identity", {"trace_rate": None}, as_json=True)["settings"]
        assert settings["trace_rate"]["value"] == ["1000"]
        location = "trace file location can not be updated through network protocol"
        assert status_of(lambda: client.update_trace_settings(settings={"trace_file": "x"})) == (
            "UNIMPLEMENTED",
            location,
        )
        assert status_of(lambda: client.update_trace_settings(settings={"trace_rate": "-1"}))[0] == "INVALID_ARGUMENT"
        assert status_of(lambda: client.update_trace_settings(settings={"x": "0"}))[0] == "INVALID_ARGUMENT"


def test_log_settings(identity_server: Start) -> None:
    server = identity_server()
    with triton.InferenceServerClient(server.url) as client:
        assert status_of(lambda: client.infer("identity", []))[0] == "INVALID_ARGUMENT"
        assert "INVALID_ARGUMENT" not in server.log
        client.update_log_settings({"log_verbose_level": 1, "log_format": "ISO8601"})
        assert status_of(lambda: client.infer("identity", []))[0] == "INVALID_ARGUMENT"
        line = wait_for(lambda: re.search(r"^(\S+) INFO .*INVALID_ARGUMENT", server.log, re.MULTILINE))
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+\d{4}", line[1])
        settings = client.get_log_settings(as_json=True)["settings"]
        assert settings["log_format"]["string_param"] == "ISO8601"
        location = "log file location can not be updated through network protocol"
        assert status_of(lambda: client.update_log_settings({"log_file": "x"})) == ("UNIMPLEMENTED", location)
        assert status_of(lambda: client.update_log_settings({"log_format": "x"}))[0] == "INVALID_ARGUMENT"


def test_statistics(triton_client: triton.InferenceServerClient) -> None:
    def figures() -> dict[str, int]:
        (found,) = triton_client.get_inference_statistics(MODEL).model_stats
        stats = json_format.MessageToDict(found.inference_stats, preserving_proto_field_name=True)
        return {name: int(duration.get("count", 0)) for name, duration in stats.items()} | {
            "inference": found.inference_count,
            "execution": found.execution_count,
            "infer_ns": found.inference_stats.compute_infer.ns,
        }

    before = figures()
    triton_client.infer(MODEL, [bytes_tensor("PROMPT", "a star")], parameters={"num_inference_steps": 1})
    after = figures()
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output", "inference", "execution"):
        assert after[name] == before[name] + 1, name
    assert after["infer_ns"] > before["infer_ns"]
    names = [m.name for m in triton_client.get_inference_statistics().model_stats]
    assert {MODEL, "identity"} <= set(names)
