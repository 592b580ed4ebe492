"""Made-up and mutated requests: always a clear answer, never a crash, a hang or a server that grows.

ZSERVE_FUZZ_EXAMPLES sets how many; the recorded run in benchmarks/results/ had 100,000.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator

import grpc
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from tests.conftest import MODEL
from tests.integration.process import PATIENCE, ServerProcess
from tests.integration.triton.conftest import IDENTITIES

EXAMPLES = int(os.environ.get("ZSERVE_FUZZ_EXAMPLES", "400"))
PATH = "/inference.GRPCInferenceService/"
CLEAR = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "UNAVAILABLE", "ALREADY_EXISTS"}
GROWTH = 64 * 2**20  # bytes that a server may gain: buffers of the largest requests, kept by the allocator

names = st.sampled_from([*IDENTITIES, "versions", MODEL, "", "nothing"]) | st.text(max_size=8)
inputs = st.sampled_from(["INPUT0", "INPUT1", "PROMPT", "SEED", "WIDTH", ""]) | st.text(max_size=8)
types = st.sampled_from(["UINT8", "INT32", "INT64", "FP32", "BF16", "BYTES", ""]) | st.text(max_size=8)
dimensions = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 4)
numbers = st.builds(pb.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1))
texts = st.builds(pb.InferParameter, string_param=st.text(max_size=8))
parameters = numbers | texts | st.builds(pb.InferParameter, bool_param=st.booleans())
keys = st.sampled_from(
    ["priority", "timeout", "sequence_id", "triton_x", "shared_memory_region", "shared_memory_byte_size"]
) | st.text(max_size=8)
contents = st.builds(
    pb.InferTensorContents,
    int_contents=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3),
    uint_contents=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    bytes_contents=st.lists(st.binary(max_size=8), max_size=3),
)
tensors = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=inputs,
    datatype=types,
    shape=st.lists(dimensions, max_size=4),
    parameters=st.dictionaries(keys, parameters, max_size=2),
    contents=contents | st.none(),
)
requests = st.builds(
    pb.ModelInferRequest,
    model_name=names,
    model_version=st.sampled_from(["", "1", "-1", "9" * 40, "x"]),
    id=st.text(max_size=8),
    parameters=st.dictionaries(keys, parameters, max_size=3),
    inputs=st.lists(tensors, max_size=3),
    outputs=st.lists(st.builds(pb.ModelInferRequest.InferRequestedOutputTensor, name=inputs), max_size=2),
    raw_input_contents=st.lists(st.binary(max_size=64), max_size=3),
)
valid = pb.ModelInferRequest(model_name="text", raw_input_contents=[b"\3\0\0\0abc"])
valid.inputs.add(name="INPUT0", datatype="BYTES", shape=[1])


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid message with some of its bytes changed, cut out or put in."""
    data = bytearray(valid.SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
        if not data:
            return b""
    return bytes(data)


cuda_regions = st.builds(
    pb.CudaSharedMemoryRegisterRequest,
    name=st.text(max_size=8),
    raw_handle=st.binary(min_size=64, max_size=64) | st.binary(max_size=80),
    device_id=st.integers(-(2**63), 2**63 - 1) | st.just(0),
    byte_size=st.integers(0, 2**64 - 1),
)
cuda_calls = st.tuples(
    st.sampled_from(["Register", "Status", "Unregister"]),
    cuda_regions.map(lambda m: m.SerializeToString()) | st.binary(max_size=64),
)
messages = requests.map(lambda m: m.SerializeToString()) | mutated() | st.binary(max_size=64)


@pytest.fixture(scope="module")
def channel(triton_server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(triton_server.url) as opened:
        yield opened


def test_any_request_gets_a_clear_status(
    triton_server: ServerProcess, channel: grpc.Channel, record_property: Callable[[str, object], None]
) -> None:
    process = psutil.Process(triton_server.process.pid)
    unary, stream = channel.unary_unary(f"{PATH}ModelInfer"), channel.stream_stream(f"{PATH}ModelStreamInfer")
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(messages, st.booleans())
    def send(message: bytes, streamed: bool) -> None:
        try:
            if streamed:
                list(stream(iter([message]), timeout=PATIENCE))
            else:
                unary(message, timeout=PATIENCE)
        except grpc.RpcError as error:
            seen[error.code().name] += 1
            assert error.code().name in CLEAR, f"{error.code()}: {error.details()}"
        else:
            seen["OK"] += 1

    before = process.memory_info().rss
    send()
    record_property("statuses", dict(seen))
    record_property("growth_bytes", process.memory_info().rss - before)
    assert process.memory_info().rss - before < GROWTH
    assert channel.unary_unary(f"{PATH}ServerLive")(b"", timeout=PATIENCE)
    assert "internal error" not in triton_server.log
    assert seen["OK"] and seen["INVALID_ARGUMENT"]


def test_any_call_about_cuda_memory_gets_a_clear_status(triton_server: ServerProcess, channel: grpc.Channel) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(cuda_calls)
    def send(wanted: tuple[str, bytes]) -> None:
        call, message = wanted
        try:
            channel.unary_unary(f"{PATH}CudaSharedMemory{call}")(message, timeout=PATIENCE)
        except grpc.RpcError as error:
            seen[error.code().name] += 1
            assert error.code().name in CLEAR, f"{error.code()}: {error.details()}"
        else:
            assert call != "Register"
            seen["OK"] += 1

    send()
    assert channel.unary_unary(f"{PATH}ServerLive")(b"", timeout=PATIENCE)
    assert "internal error" not in triton_server.log
    assert seen["OK"] and seen["INVALID_ARGUMENT"]
