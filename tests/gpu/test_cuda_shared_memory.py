"""On an NVIDIA GPU: inputs and outputs in a client's memory there, by tritonclient's helpers. Run by `make test-gpu`.

One server of an identity model and of the demo on eager serves all of these tests.
"""

import base64
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton

from tests.conftest import MODEL, run_export
from tests.integration.process import PATIENCE, ServerProcess
from tests.integration.triton.conftest import IDENTITIES, bytes_tensor, some_bytes, write_model
from tests.integration.triton.test_errors import status_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SIZE = 4096
PROMPT, SIDE = "a red circle on a white background", 256
MEBIBYTE = 1 << 20
Share = Callable[[str, int], Any]
# A process that shares memory of a GPU with the server and then ends at once, with nothing closed.
SHORT_LIVED = """
import os, sys
import numpy as np
import tritonclient.grpc as triton
import tritonclient.utils.cuda_shared_memory as cuda

handle = cuda.create_shared_memory_region("orphan", 4096, 0)
cuda.set_shared_memory_region(handle, [np.ones(4096, dtype=np.uint8)])
triton.InferenceServerClient(sys.argv[1]).register_cuda_shared_memory("orphan", cuda.get_raw_handle(handle), 0, 4096)
os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def cuda() -> Any:
    """tritonclient's helpers; they need cuda-bindings as the server does."""
    import tritonclient.utils.cuda_shared_memory as helpers

    return helpers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    repository = tmp_path_factory.mktemp("models")
    size = f"{SIDE}x{SIDE}"
    done = run_export("--repository", str(repository), "--name", MODEL, "--backend", "eager", "--default-size", size)
    assert done.returncode == 0, done.stdout + done.stderr
    write_model(repository, "identity", IDENTITIES["identity"])
    with ServerProcess(repository, "--allow-client-shm=true") as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url) as connected:
        yield connected


@pytest.fixture
def share(client: triton.InferenceServerClient, cuda: Any) -> Iterator[Share]:
    """Allocates on the GPU and registers, by name and size; the server lets go before the memory is freed."""
    with ExitStack() as undo:

        def make(name: str, size: int) -> Any:
            handle = cuda.create_shared_memory_region(name, size, 0)
            undo.callback(cuda.destroy_shared_memory_region, handle)
            client.register_cuda_shared_memory(name, cuda.get_raw_handle(handle), 0, size)
            return handle

        yield make
        client.unregister_cuda_shared_memory("")


def given(name: str, datatype: str, shape: list[int], *place: Any) -> triton.InferInput:
    made = triton.InferInput(name, shape, datatype)
    made.set_shared_memory(*place)
    return made


def wanted(name: str, *place: Any) -> triton.InferRequestedOutput:
    made = triton.InferRequestedOutput(name)
    made.set_shared_memory(*place)
    return made


def still_serves(client: triton.InferenceServerClient) -> bool:
    return bool(client.infer("identity", [some_bytes(5)]).as_numpy("OUTPUT0").tolist() == [0, 1, 2, 3, 4])


def counting(cuda: Any, handle: Any) -> np.ndarray:
    """Fills the region with bytes that count up."""
    values = np.arange(SIZE, dtype=np.uint8)
    cuda.set_shared_memory_region(handle, [values])
    return values


def test_it_is_advertised(client: triton.InferenceServerClient) -> None:
    assert {"system_shared_memory", "cuda_shared_memory"} <= set(client.get_server_metadata().extensions)


def test_an_input_and_an_output(client: triton.InferenceServerClient, cuda: Any, share: Share) -> None:
    source, target = share("source", SIZE), share("target", SIZE)
    values = counting(cuda, source)
    cuda.set_shared_memory_region(target, [np.zeros(SIZE, dtype=np.uint8)])
    inputs = [given("INPUT0", "UINT8", [1000], "source", 1000, 24)]
    result = client.infer("identity", inputs, outputs=[wanted("OUTPUT0", "target", 2000, 96)])
    assert list(result.get_response().raw_output_contents) == [b""]
    assert result.get_output("OUTPUT0").parameters["shared_memory_byte_size"].int64_param == 1000
    found = cuda.get_contents_as_numpy(target, np.uint8, [SIZE])
    assert np.array_equal(found[96:1096], values[24:1024])
    assert not found[:96].any()
    assert not found[1096:].any()


def test_an_output_is_there_when_the_answer_is(client: triton.InferenceServerClient, cuda: Any, share: Share) -> None:
    """Whatever the order of streams: the copy is complete before the response is sent."""
    size = 16 * MEBIBYTE
    target = share("large", size)
    for turn in range(3):
        values = np.random.default_rng(turn).integers(0, 256, size, dtype=np.uint8)
        made = triton.InferInput("INPUT0", [size], "UINT8")
        made.set_data_from_numpy(values)
        client.infer("identity", [made], outputs=[wanted("OUTPUT0", "large", size)])
        assert np.array_equal(cuda.get_contents_as_numpy(target, np.uint8, [size]), values)


def test_on_a_stream(client: triton.InferenceServerClient, cuda: Any, share: Share) -> None:
    source, target = share("source", SIZE), share("target", SIZE)
    values = counting(cuda, source)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for turn in range(8):
        place, size = turn * 512, 512
        inputs = [given("INPUT0", "UINT8", [size], "source", size, place)]
        outputs = [wanted("OUTPUT0", "target", size, place)]
        client.async_stream_infer("identity", inputs, outputs=outputs, request_id=str(turn))
    got = [answers.get(timeout=PATIENCE) for _ in range(8)]
    client.stop_stream()
    assert [error for _, error in got] == [None] * 8
    assert [result.get_response().id for result, _ in got] == [str(turn) for turn in range(8)]
    assert np.array_equal(cuda.get_contents_as_numpy(target, np.uint8, [SIZE]), values)


def test_an_image_is_the_one_that_is_answered_inline(
    client: triton.InferenceServerClient, cuda: Any, share: Share
) -> None:
    parameters = {"seed": 7}
    inline = client.infer(MODEL, [bytes_tensor("PROMPT", PROMPT)], parameters=parameters).as_numpy("IMAGE")
    assert inline.shape == (SIDE, SIDE, 3)
    text = len(PROMPT).to_bytes(4, "little") + PROMPT.encode()
    prompt, image = share("prompt", 256), share("image", inline.nbytes)
    cuda.set_shared_memory_region(prompt, [np.frombuffer(text, dtype=np.uint8)])
    result = client.infer(
        MODEL,
        [given("PROMPT", "BYTES", [1], "prompt", len(text))],
        outputs=[wanted("IMAGE", "image", inline.nbytes), triton.InferRequestedOutput("SEED")],
        parameters=parameters,
    )
    assert result.as_numpy("SEED").tolist() == [7]
    found = cuda.get_contents_as_numpy(image, np.uint8, list(inline.shape))
    assert np.array_equal(found, inline)
    assert inline.std() > 5, "a picture"


def test_status_and_unregister(client: triton.InferenceServerClient, share: Share) -> None:
    share("one", SIZE)
    share("two", SIZE)
    found = client.get_cuda_shared_memory_status("one").regions["one"]
    assert (found.name, found.device_id, found.byte_size) == ("one", 0, SIZE)
    assert sorted(client.get_cuda_shared_memory_status().regions) == ["one", "two"]
    client.unregister_cuda_shared_memory("one")
    assert status_of(lambda: client.get_cuda_shared_memory_status("one"))[0] == "NOT_FOUND"
    gone = status_of(lambda: client.infer("identity", [given("INPUT0", "UINT8", [8], "one", 8)]))
    assert gone == ("NOT_FOUND", "Unable to find shared memory region: 'one'")
    assert client.infer("identity", [given("INPUT0", "UINT8", [8], "two", 8)]).as_numpy("OUTPUT0").size == 8


def test_nothing_outside_what_was_registered(client: triton.InferenceServerClient, cuda: Any, share: Share) -> None:
    handle = share("region", SIZE)
    raw, count = cuda.get_raw_handle(handle), torch.cuda.device_count()
    cases: dict[str, tuple[Callable[[], Any], str, str]] = {
        "input past the end": (
            lambda: client.infer("identity", [given("INPUT0", "UINT8", [8], "region", 8, SIZE - 4)]),
            "INVALID_ARGUMENT",
            "Invalid offset + byte size for shared memory region: 'region'",
        ),
        "output past the end": (
            lambda: client.infer("identity", [some_bytes(8)], outputs=[wanted("OUTPUT0", "region", 8, SIZE - 4)]),
            "INVALID_ARGUMENT",
            "Invalid offset + byte size for shared memory region: 'region'",
        ),
        "output too small": (
            lambda: client.infer("identity", [some_bytes(8)], outputs=[wanted("OUTPUT0", "region", 4)]),
            "INVALID_ARGUMENT",
            "should be at least 8 bytes",
        ),
        "more than was allocated": (
            lambda: client.register_cuda_shared_memory("more", raw, 0, 1 << 40),
            "INVALID_ARGUMENT",
            "failed to register shared memory region 'more': invalid args",
        ),
        "nothing": (lambda: client.register_cuda_shared_memory("n", raw, 0, 0), "INVALID_ARGUMENT", "byte_size 0"),
        "twice": (lambda: client.register_cuda_shared_memory("region", raw, 0, 8), "ALREADY_EXISTS", "in manager"),
        "no such GPU": (lambda: client.register_cuda_shared_memory("n", raw, count, 8), "INVALID_ARGUMENT", "device"),
        "negative": (lambda: client.register_cuda_shared_memory("n", raw, -1, 8), "INVALID_ARGUMENT", "device_id"),
        "half a handle": (
            lambda: client.register_cuda_shared_memory("n", base64.b64encode(b"x" * 32), 0, 8),
            "INVALID_ARGUMENT",
            "raw_handle",
        ),
    }
    for name, (call, status, text) in cases.items():
        found = status_of(call)
        assert found[0] == status, name
        assert text in found[1], name
    assert list(client.get_cuda_shared_memory_status().regions) == ["region"]
    assert still_serves(client)


def test_the_device_is_let_go_with_the_last_region(
    client: triton.InferenceServerClient, cuda: Any, record_property: Callable[..., None]
) -> None:
    def used() -> int:
        free, total = torch.cuda.mem_get_info(0)
        return total - free

    client.unregister_cuda_shared_memory("")
    handle = cuda.create_shared_memory_region("region", SIZE, 0)
    before = used()
    client.register_cuda_shared_memory("region", cuda.get_raw_handle(handle), 0, SIZE)
    during = used()
    client.unregister_cuda_shared_memory("region")
    after = used()
    cuda.destroy_shared_memory_region(handle)
    record_property("context_bytes", during - before)
    assert during - before > 50 * MEBIBYTE
    assert during - after > 50 * MEBIBYTE


def test_a_client_that_dies_harms_no_other(
    server: ServerProcess, client: triton.InferenceServerClient, cuda: Any, share: Share
) -> None:
    """What its memory then holds is not defined: the request may fail, clearly, or get bytes."""
    counting(cuda, share("region", SIZE))
    done = subprocess.run([sys.executable, "-c", SHORT_LIVED, server.url], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "orphan" in client.get_cuda_shared_memory_status().regions
    try:
        client.infer("identity", [given("INPUT0", "UINT8", [8], "orphan", 8)])
    except triton.InferenceServerException as error:
        assert "INTERNAL" in error.status()
        assert "failed to copy CUDA shared memory region 'orphan'" in error.message()
    client.unregister_cuda_shared_memory("orphan")
    found = client.infer("identity", [given("INPUT0", "UINT8", [4], "region", 4)]).as_numpy("OUTPUT0")
    assert found.tolist() == [0, 1, 2, 3]
    assert still_serves(client)


def test_handles_that_are_none(server: ServerProcess, client: triton.InferenceServerClient) -> None:
    random = np.random.default_rng(3)
    for raw in (bytes(64), b"\xff" * 64, *(random.bytes(64) for _ in range(20))):
        found = status_of(lambda raw=raw: client.register_cuda_shared_memory("n", base64.b64encode(raw), 0, 8))  # type: ignore[misc]
        assert found[0] == "INVALID_ARGUMENT", found
        assert "failed to register shared memory region 'n': failed to open CUDA IPC handle: cuIpc" in found[1]
    assert not client.get_cuda_shared_memory_status().regions
    assert still_serves(client)
    assert "internal error" not in server.log
