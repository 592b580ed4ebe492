"""Made-up and mutated requests: always a clear answer, never a crash, a hang or a server that grows.

ZSERVE_FUZZ_EXAMPLES sets how many calls are made, half of them inferences, the others of all kinds that change things;
the recorded run in benchmarks/results/ made 100,000.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from tests.conftest import MODEL, copy_model
from tests.integration.process import PATIENCE, ServerProcess
from tests.integration.triton.conftest import IDENTITIES, write_model

EXAMPLES = int(os.environ.get("ZSERVE_FUZZ_EXAMPLES", "800"))
PATH = "/inference.GRPCInferenceService/"
CLEAR = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "UNAVAILABLE", "ALREADY_EXISTS"}
CHANGING = ["identity", "numbers", "versions"]  # models that are loaded with other configs, and unloaded
KEY = f"zserve_fuzz_{os.getpid()}"  # a shared memory object of REGION bytes
REGION = 4096
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
text_request = pb.ModelInferRequest(model_name="text", raw_input_contents=[b"\3\0\0\0abc"])
text_request.inputs.add(name="INPUT0", datatype="BYTES", shape=[1])

anything = st.text(max_size=8)
small = st.integers(-2, 4)
signed, unsigned = st.integers(-(2**63), 2**63 - 1) | small, st.integers(0, 2**64 - 1) | st.integers(0, REGION)
regions = st.sampled_from(["region", "region", "", "r2", "\0"]) | anything
system_regions = st.builds(
    pb.SystemSharedMemoryRegisterRequest,
    name=regions,
    key=st.sampled_from([KEY, f"/{KEY}", f"/../shm/{KEY}", ".", "/"]) | anything,
    offset=unsigned,
    byte_size=unsigned,
)
cuda_regions = st.builds(
    pb.CudaSharedMemoryRegisterRequest,
    name=regions,
    raw_handle=st.binary(min_size=64, max_size=64) | st.binary(max_size=80),
    device_id=signed,
    byte_size=unsigned,
)

trace_names = ["trace_level", "trace_rate", "trace_count", "log_frequency", "trace_file", "trace_mode"]
trace_values = st.sampled_from(["OFF", "TIMESTAMPS", "TENSORS", "1", "0", "-1", "9" * 30, "triton"]) | anything
trace_settings = st.builds(
    pb.TraceSettingRequest,
    model_name=names,
    settings=st.dictionaries(
        st.sampled_from(trace_names) | anything,
        st.builds(pb.TraceSettingRequest.SettingValue, value=st.lists(trace_values, max_size=3)),
        max_size=3,
    ),
)
log_names = ["log_file", "log_info", "log_warning", "log_error", "log_verbose_level", "log_format"]
log_values = (
    st.builds(pb.LogSettingsRequest.SettingValue, bool_param=st.booleans())
    | st.builds(pb.LogSettingsRequest.SettingValue, uint32_param=st.integers(0, 2**32 - 1))
    | st.builds(pb.LogSettingsRequest.SettingValue, string_param=st.sampled_from(["default", "ISO8601"]) | anything)
)
log_settings = st.builds(
    pb.LogSettingsRequest,
    settings=st.dictionaries(st.sampled_from(log_names) | anything, log_values, max_size=3),
)

config_tensors = st.lists(
    st.fixed_dictionaries(
        {"name": inputs, "data_type": st.sampled_from(["TYPE_UINT8", "TYPE_STRING", "TYPE_INVALID", 99])},
        optional={"dims": st.lists(signed, max_size=3), "optional": st.booleans()},
    ),
    max_size=2,
)
counts = st.integers(-(2**31), 2**31 - 1) | small
# A max_queue_delay is left out: however long it is, it may be meant.
changes = st.fixed_dictionaries(
    {},
    optional={
        "name": names,
        "backend": st.sampled_from(["identity", "identity", "nothing"]) | anything,
        "max_batch_size": counts,
        "input": config_tensors,
        "output": config_tensors,
        "instance_group": st.lists(st.fixed_dictionaries({"count": counts}), max_size=2),
        "version_policy": st.sampled_from([{"all": {}}, {"latest": {"num_versions": 2**32 - 1}}])
        | st.fixed_dictionaries({"specific": st.fixed_dictionaries({"versions": st.lists(signed, max_size=2)})}),
        "dynamic_batching": st.fixed_dictionaries(
            {},
            optional={
                "priority_levels": unsigned,
                "default_priority_level": unsigned,
                "preferred_batch_size": st.lists(counts, max_size=2),
                "priority_queue_policy": st.dictionaries(
                    unsigned.map(str), st.fixed_dictionaries({"max_queue_size": st.integers(0, 2**32 - 1)}), max_size=2
                ),
            },
        ),
        "model_transaction_policy": st.fixed_dictionaries({"decoupled": st.booleans()}),
        "parameters": st.dictionaries(
            st.sampled_from(["execute_delay_ms"]) | anything,
            st.fixed_dictionaries({"string_value": st.sampled_from(["nan", "-1", "1e400", "0"])}),
            max_size=2,
        ),
        "sequence_batching": st.just({}),
    },
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """An identity model's config, of which little has been changed: most would be refused for the first thing alone."""
    tensor = [{"name": "T", "data_type": "TYPE_UINT8", "dims": [-1]}]
    changed = draw(changes)
    kept = draw(st.sets(st.sampled_from(sorted(changed)), max_size=2)) if changed else set()
    return {"backend": "identity", "input": tensor, "output": tensor} | {key: changed[key] for key in kept}


as_json = configs().map(json.dumps) | st.recursive(st.none() | signed | anything, st.lists).map(json.dumps) | anything
load_values = st.builds(pb.ModelRepositoryParameter, string_param=as_json) | st.builds(
    pb.ModelRepositoryParameter, bytes_param=st.binary(max_size=16)
)
load_names = st.sampled_from([*["config"] * 4, "file:1/a", "file:1/a/b", "file:../a", "file:config.pbtxt", "file:"])
repository_names = st.just("") | anything
changing = st.sampled_from([*3 * CHANGING, "broken", "nothing", "", ".", "..", "a/b", "\0", "n" * 300])
loads = st.builds(
    pb.RepositoryModelLoadRequest,
    repository_name=st.just(""),
    model_name=changing,
    parameters=st.just({})
    | st.fixed_dictionaries(
        {"config": configs().map(lambda c: pb.ModelRepositoryParameter(string_param=json.dumps(c)))},
        optional={"file:1/a": st.builds(pb.ModelRepositoryParameter, bytes_param=st.binary(max_size=16))},
    )
    | st.dictionaries(load_names | anything, load_values, max_size=2),
)
unloads = st.builds(
    pb.RepositoryModelUnloadRequest,
    model_name=changing,
    parameters=st.dictionaries(st.just("unload_dependents") | anything, load_values, max_size=1),
)


def named(kind: type[Any], values: st.SearchStrategy[str] = regions) -> st.SearchStrategy[Any]:
    return st.builds(kind, name=values)


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[Any]) -> bytes:
    """A message with some of its bytes changed, cut out or put in."""
    data = bytearray(draw(valid).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(data)


def calls(kinds: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Calls of these kinds by name, with what they may be sent: as it is, mutated, and any bytes at all."""

    def of(kind: str) -> st.SearchStrategy[tuple[str, bytes]]:
        made = kinds[kind].map(lambda m: m.SerializeToString())
        return st.tuples(st.just(kind), st.one_of(made, made, made, mutated(kinds[kind]), st.binary(max_size=64)))

    return st.sampled_from(sorted(kinds)).flatmap(of)


infer_requests = requests | st.just(text_request)
INFERENCES = {"ModelInfer": infer_requests, "ModelStreamInfer": infer_requests}
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "SystemSharedMemoryRegister": system_regions,
    "SystemSharedMemoryStatus": named(pb.SystemSharedMemoryStatusRequest),
    "SystemSharedMemoryUnregister": named(pb.SystemSharedMemoryUnregisterRequest),
    "CudaSharedMemoryRegister": cuda_regions,
    "CudaSharedMemoryStatus": named(pb.CudaSharedMemoryStatusRequest),
    "CudaSharedMemoryUnregister": named(pb.CudaSharedMemoryUnregisterRequest),
    "TraceSetting": trace_settings,
    "LogSettings": log_settings,
    "RepositoryIndex": st.builds(pb.RepositoryIndexRequest, repository_name=repository_names, ready=st.booleans()),
    "RepositoryModelLoad": loads,
    "RepositoryModelUnload": unloads,
    "ModelConfig": named(pb.ModelConfigRequest, names),
    "ModelMetadata": named(pb.ModelMetadataRequest, names),
    "ModelStatistics": named(pb.ModelStatisticsRequest, names),
}


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One of its own: what is changed here is nobody else's."""
    folder = tmp_path_factory.mktemp("fuzzed")
    models = folder / "models"
    models.mkdir()
    copy_model(repository, models)
    for name, config in IDENTITIES.items():
        write_model(models, name, config, ("1", "3") if name == "versions" else ("1",))
    write_model(models, "versions", IDENTITIES["identity"] + "\nversion_policy { all {} }", ("1", "3"))
    write_model(models, "broken", "backend: 'nothing_of_that_name'")
    wanted = [flag for name in (MODEL, "versions", *IDENTITIES) for flag in ("--load-model", name)]
    traces = ("--trace-config=level=TIMESTAMPS", "--trace-config=rate=2", f"--trace-config=file={folder / 'traces'}")
    with ServerProcess(models, "--model-control-mode=explicit", *wanted, "--allow-client-shm=true", *traces) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.url) as opened:
        yield opened


@pytest.fixture
def memory_object() -> Iterator[None]:
    path = Path("/dev/shm", KEY)
    path.write_bytes(bytes(REGION))
    yield
    path.unlink()


def status_of(channel: grpc.Channel, call: str, message: bytes) -> str:
    """Makes the call; INTERNAL is clear only with a reason."""
    try:
        if call == "ModelStreamInfer":
            answers = list(channel.stream_stream(PATH + call)(iter([message]), timeout=PATIENCE))
        else:
            answers = [channel.unary_unary(PATH + call)(message, timeout=PATIENCE)]
    except grpc.RpcError as error:
        clear = {*CLEAR, "INTERNAL"} if call in ("RepositoryModelLoad", "SystemSharedMemoryRegister") else CLEAR
        assert error.code().name in clear, f"{call}: {error.code()}: {error.details()}"
        assert not error.details().startswith("internal error"), f"{call}: {error.details()}"
        return str(error.code().name)
    assert not any(b"internal error" in answer for answer in answers), call
    return "OK"


def put_right(channel: grpc.Channel) -> None:
    """What was changed is as it was, and works."""
    errors = pb.LogSettingsRequest()
    errors.settings["log_error"].bool_param = True
    sent: list[tuple[str, Any]] = [("LogSettings", errors)]
    sent += [(f"{kind}SharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest()) for kind in ("System", "Cuda")]
    sent += [("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=name)) for name in CHANGING]
    sent += [("ModelReady", pb.ModelReadyRequest(name=name)) for name in (MODEL, *IDENTITIES)]
    sent += [("ModelInfer", text_request), ("ServerLive", pb.ServerLiveRequest())]
    for call, message in sent:
        assert status_of(channel, call, message.SerializeToString()) == "OK", call
    logs, traces = pb.LogSettingsResponse(), pb.TraceSettingResponse()
    logs.ParseFromString(channel.unary_unary(f"{PATH}LogSettings")(b"", timeout=PATIENCE))
    traces.ParseFromString(channel.unary_unary(f"{PATH}TraceSetting")(b"", timeout=PATIENCE))
    assert not logs.settings["log_file"].string_param
    assert traces.settings["trace_file"].value[0].endswith("/traces")


@pytest.mark.usefixtures("memory_object")
def test_any_call_gets_a_clear_status(
    server: ServerProcess, channel: grpc.Channel, record_property: Callable[[str, object], None]
) -> None:
    process = psutil.Process(server.process.pid)
    seen: dict[str, Counter[str]] = {call: Counter() for call in (*INFERENCES, *CHANGES)}

    @settings(
        max_examples=EXAMPLES // 2,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(calls(INFERENCES), calls(CHANGES))
    def send(inference: tuple[str, bytes], change: tuple[str, bytes]) -> None:
        for call, message in (inference, change):
            seen[call][status_of(channel, call, message)] += 1

    put_right(channel)
    memory, files = process.memory_info().rss, process.num_fds()
    send()
    put_right(channel)
    record_property("statuses", {call: dict(statuses) for call, statuses in seen.items()})
    record_property("growth_bytes", process.memory_info().rss - memory)
    assert process.memory_info().rss - memory < GROWTH
    assert process.num_fds() <= files + 8
    assert "internal error" not in server.log
    assert "Traceback" not in server.log
    assert seen["ModelInfer"]["OK"]
    assert seen["ModelInfer"]["INVALID_ARGUMENT"]
    if EXAMPLES >= 20_000:  # fewer are spread too unevenly
        assert all(seen.values())
        wanting = [call for call in CHANGES if not seen[call]["OK"]]
        assert wanting in ([], ["CudaSharedMemoryRegister"]), seen
