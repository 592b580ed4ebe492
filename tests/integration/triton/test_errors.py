"""Every error of the protocol by its status, the two texts that clients compare by text."""

import queue
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from server.tensors import join_strings
from tests.conftest import MODEL
from tests.integration.process import PATIENCE, ServerProcess, wait_for
from tests.integration.triton.conftest import ENDLESS, bytes_tensor, pending, some_bytes, under_way

INVALID, NOT_FOUND, UNIMPLEMENTED = "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"


def request(model: str = "identity", **fields: object) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(model_name=model, **fields)


def with_input(name: str = "INPUT0", datatype: str = "UINT8", shape: tuple[int, ...] = (2,)) -> pb.ModelInferRequest:
    made = request()
    made.inputs.add(name=name, datatype=datatype, shape=shape)
    return made


def raw(made: pb.ModelInferRequest, *data: bytes) -> pb.ModelInferRequest:
    made.raw_input_contents.extend(data)
    return made


def strings(data: bytes, count: int = 1) -> pb.ModelInferRequest:
    made = request("text")
    made.inputs.add(name="INPUT0", datatype="BYTES", shape=[count])
    return raw(made, data)


def batched(*shape: int) -> pb.ModelInferRequest:
    made = request("batched")
    made.inputs.add(name="INPUT0", datatype="FP32", shape=shape)
    return raw(made, b"\0" * 4 * int(np.prod(shape)))


def pair(first: int, second: int) -> pb.ModelInferRequest:
    """Two inputs that should have as many rows as each other."""
    made = request("pair")
    for number, rows in enumerate((first, second)):
        made.inputs.add(name=f"INPUT{number}", datatype="UINT8", shape=[rows, 1])
    return raw(made, b"a" * first, b"b" * second)


def parameter(name: str, **value: object) -> pb.ModelInferRequest:
    made = raw(with_input(), b"ab")
    made.parameters[name].CopyFrom(pb.InferParameter(**value))
    return made


def twice(what: str) -> pb.ModelInferRequest:
    made = raw(with_input(), b"ab")
    getattr(made, what).add(name="INPUT0" if what == "inputs" else "OUTPUT0")
    if what == "inputs":
        made.inputs[1].CopyFrom(made.inputs[0])
    else:
        made.outputs.add(name="OUTPUT0")
    return made


def typed(field: str, *values: object, model: str = "identity", datatype: str = "UINT8") -> pb.ModelInferRequest:
    made = request(model)
    made.inputs.add(name="INPUT0", datatype=datatype, shape=[len(values)])
    getattr(made.inputs[0].contents, field).extend(values)
    return made


def typed_strings(*values: bytes) -> pb.ModelInferRequest:
    made = typed("bytes_contents", *values, model="text", datatype="BYTES")
    made.inputs[0].shape[:] = [1]
    return made


def mixed() -> pb.ModelInferRequest:
    made = raw(with_input(), b"ab")
    made.inputs[0].contents.uint_contents.extend([1, 2])
    return made


def output(name: str = "OUTPUT0", **parameters: int) -> pb.ModelInferRequest:
    made = raw(with_input(), b"ab")
    item = made.outputs.add(name=name)
    for key, value in parameters.items():
        item.parameters[key].int64_param = value
    return made


def image(prompt: bytes = b"a", **parameters: object) -> pb.ModelInferRequest:
    made = request(MODEL)
    made.inputs.add(name="PROMPT", datatype="BYTES", shape=[1])
    for key, value in parameters.items():
        kind = {int: "int64_param", float: "double_param", str: "string_param", bool: "bool_param"}[type(value)]
        setattr(made.parameters[key], kind, value)
    return raw(made, join_strings([prompt]))


BAD: dict[str, tuple[pb.ModelInferRequest, str, str]] = {
    "unknown model": (request("x"), NOT_FOUND, "unknown model: 'x'"),
    "unknown version": (request(model_version="9"), NOT_FOUND, "version 9 is not found"),
    "version not a number": (request(model_version="x"), INVALID, "version string 'x'"),
    "version with two signs": (request(model_version="--5"), INVALID, "version string '--5'"),
    "version below 1": (request(model_version="-1"), INVALID, "invalid model version specified '-1'"),
    "not loaded": (request("broken"), NOT_FOUND, "broken"),
    "wrong type": (raw(with_input(datatype="FP32"), b"ab"), INVALID, "data-type is 'FP32'"),
    "wrong rank": (raw(with_input(shape=(1, 2)), b"ab"), INVALID, "unexpected shape for input 'INPUT0'"),
    "unspecified dimension": (raw(with_input(shape=(-1,)), b"ab"), INVALID, "All input dimensions should be specified"),
    "missing input": (request(), INVALID, "expected 1 inputs but got 0 inputs"),
    "missing required input": (request(MODEL), INVALID, "expected number of inputs between 1 and 10"),
    "unknown input": (raw(with_input("OTHER"), b"ab"), INVALID, "INPUT0 are known"),
    "unknown output": (output("OTHER"), INVALID, "OUTPUT0 are known"),
    "duplicate input": (twice("inputs"), INVALID, "input 'INPUT0' already exists in request"),
    "duplicate output": (twice("outputs"), INVALID, "output 'OUTPUT0' already exists in request"),
    "batch too large": (batched(9, 1), INVALID, "batch-size must be <= 8 for 'batched'"),
    "no batch dimension": (batched(), INVALID, "has no shape but model requires batch dimension"),
    "batches that differ": (pair(1, 2), INVALID, "input 'INPUT1' batch size does not match other inputs for 'pair'"),
    "too few bytes": (raw(with_input(), b"a"), INVALID, "Expected 2, got 1"),
    "huge shape": (raw(with_input(shape=(2**62,)), b"a"), INVALID, "input byte size mismatch"),
    "string length cut off": (strings(b"\1\0"), INVALID, "incomplete string length indicator"),
    "string cut off": (strings(b"\5\0\0\0a"), INVALID, "incomplete string data"),
    # What follows the second of them is not even looked at: there may be millions.
    "too many strings": (strings(b"\1\0\0\0a" * 2 + b"\xff"), INVALID, "expected 1 string elements"),
    "too many typed strings": (typed_strings(b"a", b"b"), INVALID, "expected 1 string elements"),
    "too few strings": (strings(b"\1\0\0\0a", 2), INVALID, "expected 2 string elements"),
    "raw and typed": (mixed(), INVALID, "contents field must not be specified when using raw_input_contents"),
    "no data": (with_input(), INVALID, "unable to find data for input tensor 'INPUT0'"),
    "more data than inputs": (raw(with_input(), b"ab", b"cd"), INVALID, "left over"),
    "typed as another type": (typed("fp32_contents", 1.0), INVALID, "expected datatype 'UINT8'"),
    "typed out of range": (typed("uint_contents", 300), INVALID, "does not fit into UINT8"),
    "sequence_id": (parameter("sequence_id", bool_param=True), INVALID, "'sequence_id' parameter"),
    "sequence_start": (parameter("sequence_start", int64_param=1), INVALID, "expected bool_param"),
    "priority": (parameter("priority", string_param="1"), INVALID, "expected int64_param or uint64_param"),
    "negative priority": (parameter("priority", int64_param=-1), INVALID, "expected value >= 0"),
    "timeout": (parameter("timeout", string_param="1"), INVALID, "expected int64_param"),
    "custom uint64": (parameter("own", uint64_param=1), INVALID, "invalid value type for 'own'"),
    "reserved": (parameter("triton_x", bool_param=True), INVALID, "are reserved for Triton usage"),
    "classification": (output(classification=1), UNIMPLEMENTED, "classification"),
    "decoupled": (request("repeat"), UNIMPLEMENTED, "decoupled transaction policy"),
    "delay": (parameter("execute_delay_ms", int64_param=-1), INVALID, "execute_delay_ms"),
    "image width": (image(width=100), INVALID, "width: 100"),
    "image steps": (image(num_inference_steps=0), INVALID, "num_inference_steps: 0"),
    "image steps, a fraction": (image(num_inference_steps=8.9), INVALID, "num_inference_steps: 8.9"),
    "image width, a fraction": (image(width=64.7), INVALID, "width: 64.7 is not accepted; a whole number"),
    "image seed, infinite": (image(seed=float("inf")), INVALID, "seed: inf"),
    "image prompt": (image(b"a" * 200_000), INVALID, "32768 characters at most are, this has 200000 bytes"),
    "preview interval": (image(preview_interval="often"), INVALID, "preview_interval: 'often'"),
    "previews without a stream": (image(preview_interval="1"), INVALID, "ModelStreamInfer"),
    "image seed": (
        image(seed=-1),
        INVALID,
        "seed: -1 is not accepted; a whole number from 0 to 9223372036854775807 is",
    ),
    "image format": (image(image_format="bmp"), INVALID, "image_format: 'bmp'"),
    "image guidance": (image(guidance_scale=float("nan")), INVALID, "guidance_scale"),
    "image parameter": (image(stesp=4), INVALID, "num_inference_steps"),
    "image parameter beside its input": (image(PROMPT="a tree"), INVALID, "prompt: given as an input and as a param"),
    "progress without a stream": (image(progress=True), INVALID, "ModelStreamInfer"),
    "prompt not UTF-8": (
        raw(request(MODEL, inputs=image().inputs), b"\1\0\0\0\xff"),
        INVALID,
        "prompt: not UTF-8",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_request_is_told_what_is_wrong(triton_client: triton.InferenceServerClient, case: str) -> None:
    message, status, text = BAD[case]
    with pytest.raises(grpc.RpcError) as caught:
        triton_client._client_stub.ModelInfer(message)
    assert caught.value.code() is getattr(grpc.StatusCode, status)
    assert text in caught.value.details()


def status_of(call: Callable[[], object]) -> tuple[str, str]:
    """The status and the text that `call` ends with."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


def test_what_is_not_there_is_not_ready(triton_client: triton.InferenceServerClient) -> None:
    """As in Triton: scripts ask until it is."""
    assert triton_client.is_model_ready("identity", "1")
    assert not triton_client.is_model_ready("x")
    assert not triton_client.is_model_ready("identity", "9")
    assert status_of(lambda: triton_client.is_model_ready("identity", "x"))[0] == INVALID


def test_other_calls_name_what_is_unknown(triton_client: triton.InferenceServerClient) -> None:
    client = triton_client
    assert status_of(lambda: client.get_model_metadata("x"))[0] == NOT_FOUND
    assert status_of(lambda: client.get_model_config("x"))[0] == NOT_FOUND
    assert status_of(lambda: client.get_trace_settings("x"))[0] == NOT_FOUND
    unknown = status_of(lambda: client.get_inference_statistics("x"))
    assert unknown == (INVALID, "requested model 'x' is not available")
    version = status_of(lambda: client.get_inference_statistics("identity", "9"))
    assert version == (INVALID, "requested model version is not available for model 'identity'")


def test_what_the_calls_of_the_repository_do_not_take(triton_client: triton.InferenceServerClient) -> None:
    stub = triton_client._client_stub
    unknown = {"x": pb.ModelRepositoryParameter(bool_param=True)}
    calls: dict[str, tuple[Callable[[], object], str, str]] = {
        "index": (lambda: stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="r")), UNIMPLEMENTED, "name'"),
        "load": (
            lambda: stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="identity", parameters=unknown)),
            INVALID,
            "unrecognized load parameter 'x'.",
        ),
        "files without config": (
            lambda: triton_client.load_model("identity", files={"file:1/model": b"x"}),
            INVALID,
            "config",
        ),
        "cuda status": (lambda: triton_client.get_cuda_shared_memory_status("x"), NOT_FOUND, "cuda shared memory"),
    }
    for name, (call, status, text) in calls.items():
        with pytest.raises((grpc.RpcError, InferenceServerException)) as caught:
            call()
        assert status in str(caught.value), name
        assert text in str(caught.value), name


def test_a_server_that_stops_says_so(identity_server: Callable[..., ServerProcess]) -> None:
    server = identity_server()
    answers: queue.Queue[InferenceServerException | None] = queue.Queue()
    with triton.InferenceServerClient(server.url) as client:
        slow = {"execute_delay_ms": 2000}
        client.async_infer("identity", [some_bytes()], lambda result, error: answers.put(error), parameters=slow)
        wait_for(lambda: server.metric("zserve_requests_under_way", model="identity"))
        server.process.terminate()
        wait_for(lambda: "shutting down" in server.log)
        assert status_of(client.is_server_live) == ("UNAVAILABLE", "Server exiting")
        assert status_of(client.is_server_ready) == ("UNAVAILABLE", "Server exiting")
        stopping = "GRPC server is shutting down and has stopped accepting new requests."
        assert status_of(lambda: client.infer("identity", [some_bytes()])) == ("UNAVAILABLE", stopping)
        assert answers.get(timeout=30) is None  # what was under way is answered


def test_a_full_queue_in_tritons_words(
    triton_server: ServerProcess, triton_client: triton.InferenceServerClient
) -> None:
    ends: queue.Queue[InferenceServerException] = queue.Queue()

    def send(microseconds: int | None = None) -> Any:  # of which tritonclient names no type
        return triton_client.async_infer(
            "small_queue",
            [some_bytes()],
            lambda result, error: ends.put(error),
            parameters=ENDLESS,
            timeout=microseconds,
        )

    def next_end() -> tuple[str, str]:
        error = ends.get(timeout=PATIENCE)
        return error.status().removeprefix("StatusCode."), error.message()

    running = send()
    wait_for(lambda: under_way(triton_server, "small_queue") == 1)
    waiting = send()
    wait_for(lambda: under_way(triton_server, "small_queue") == 2)
    assert pending(triton_server, "small_queue") == 1
    send()
    assert next_end() == ("UNAVAILABLE", "Exceeds maximum queue size")
    waiting.cancel()
    assert next_end()[0] == "CANCELLED"
    wait_for(lambda: under_way(triton_server, "small_queue") == 1)
    send(microseconds=1000)
    assert next_end() == ("UNAVAILABLE", "Request timeout expired")
    assert triton_server.metric("nv_inference_request_failure", model="small_queue", reason="REJECTED") == 2
    assert pending(triton_server, "small_queue") == 0
    running.cancel()
    assert next_end()[0] == "CANCELLED"


def test_the_server_draws_on_after_all_that(triton_client: triton.InferenceServerClient) -> None:
    steps = {"num_inference_steps": 1}
    result = triton_client.infer(MODEL, [bytes_tensor("PROMPT", "a cross")], parameters=steps)
    assert result.as_numpy("IMAGE").shape == (256, 256, 3)
    wait_for(lambda: triton_client.is_server_ready() or None)
