"""A server with the demo model and several identity models, under explicit control and with shared memory allowed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.conftest import MODEL
from tests.integration.process import ServerProcess

TENSOR = "{kind} {{ name: '{name}' data_type: {type} dims: [ -1 ] }}"


def identity_config(*types: str, extra: str = "") -> str:
    """The config of an identity model with an input and an output of each type."""
    inputs = [TENSOR.format(kind="input", name=f"INPUT{i}", type=t) for i, t in enumerate(types)]
    outputs = [TENSOR.format(kind="output", name=f"OUTPUT{i}", type=t) for i, t in enumerate(types)]
    return "\n".join(["backend: 'identity'", *inputs, *outputs, extra])


NUMBERS = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64")
IDENTITIES = {
    "identity": identity_config("TYPE_UINT8"),
    "text": identity_config("TYPE_STRING"),
    "numbers": identity_config(*(f"TYPE_{t}" for t in NUMBERS)),
    "two": identity_config("TYPE_INT32", "TYPE_STRING"),
    "batched": identity_config(
        "TYPE_FP32", extra="max_batch_size: 8\ndynamic_batching { max_queue_delay_microseconds: 200000 }"
    ),
    "pair": identity_config("TYPE_UINT8", "TYPE_UINT8", extra="max_batch_size: 4"),
    "small_queue": identity_config(
        "TYPE_UINT8",
        extra="dynamic_batching { default_queue_policy { max_queue_size: 1 allow_timeout_override: true } }",
    ),
    "repeat": identity_config("TYPE_INT32", extra="model_transaction_policy { decoupled: true }"),
}
# It waits for a full batch for longer than any test, and so is not for tests that send it anything but that.
FULL_BATCHES = identity_config(
    "TYPE_FP32", extra="max_batch_size: 8\ndynamic_batching { max_queue_delay_microseconds: 3600000000 }"
)
ENDLESS = {"execute_delay_ms": 3_600_000}  # the parameters of a request that is there until it is cancelled


def write_model(repository: Path, name: str, config: str, versions: tuple[str, ...] = ("1",)) -> Path:
    folder = repository / name
    for version in versions:
        (folder / version).mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config)
    return folder


@pytest.fixture(scope="session")
def triton_repository(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / MODEL).symlink_to(repository / MODEL)
    for name, config in IDENTITIES.items():
        write_model(folder, name, config)
    write_model(folder, "full_batches", FULL_BATCHES)
    write_model(folder, "broken", "backend: 'nothing_of_that_name'")
    write_model(folder, "versions", identity_config("TYPE_UINT8", extra="version_policy { all {} }"), ("1", "3"))
    return folder


@pytest.fixture(scope="session")
def triton_server(triton_repository: Path) -> Iterator[ServerProcess]:
    wanted = [flag for name in (MODEL, "versions", "full_batches", *IDENTITIES) for flag in ("--load-model", name)]
    arguments = ("--model-control-mode=explicit", *wanted, "--allow-client-shm=true")
    with ServerProcess(triton_repository, *arguments) as running:
        yield running


@pytest.fixture
def triton_client(triton_server: ServerProcess) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(triton_server.url) as connected:
        yield connected


@pytest.fixture
def identity_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers of one identity model, which are there in a second; other models may be put beside it."""
    write_model(tmp_path / "models", "identity", IDENTITIES["identity"])
    running: list[ServerProcess] = []

    def start(*arguments: str) -> ServerProcess:
        server = ServerProcess(tmp_path / "models", *arguments)
        running.append(server)
        server.wait_until_ready()
        return server

    yield start
    for server in running:
        server.stop()


def under_way(server: ServerProcess, model: str) -> float:
    """The requests for `model` that are in the server."""
    return server.metric("zserve_requests_under_way", model=model)


def pending(server: ServerProcess, model: str) -> float:
    """Those of them that wait to be executed."""
    return server.metric("nv_inference_pending_request_count", model=model)


def tensor(name: str, values: np.ndarray, datatype: str) -> triton.InferInput:
    """An input with its data."""
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def bytes_tensor(name: str, *texts: str | bytes) -> triton.InferInput:
    raw = [t.encode() if isinstance(t, str) else t for t in texts]
    return tensor(name, np.array(raw, dtype=object), "BYTES")


def some_bytes(count: int = 5) -> triton.InferInput:
    return tensor("INPUT0", np.arange(count, dtype=np.uint8), "UINT8")
