"""System shared memory through tritonclient's own helpers; never outside what was registered.

CUDA shared memory is in tests/unit/server/test_shared_memory.py and tests/gpu/test_cuda_shared_memory.py.
"""

import base64
import os
import queue
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from tests.conftest import MODEL
from tests.integration.process import PATIENCE, ServerProcess
from tests.integration.triton.conftest import bytes_tensor, some_bytes
from tests.integration.triton.test_errors import status_of

SIZE = 64
KEY = f"/zserve_test_{os.getpid()}"


@pytest.fixture
def region(triton_client: triton.InferenceServerClient) -> Iterator[object]:
    """64 bytes that count up, registered as `region`."""
    handle = shm.create_shared_memory_region("region", KEY, SIZE)
    shm.set_shared_memory_region(handle, [np.arange(SIZE, dtype=np.uint8)])
    triton_client.register_system_shared_memory("region", KEY, SIZE)
    yield handle
    triton_client.unregister_system_shared_memory("")
    shm.destroy_shared_memory_region(handle)


def shared(size: int, offset: int = 0, region: str = "region") -> triton.InferInput:
    made = triton.InferInput("INPUT0", [size], "UINT8")
    made.set_shared_memory(region, size, offset)
    return made


def test_input_and_output_in_shared_memory(triton_client: triton.InferenceServerClient, region: object) -> None:
    result = triton_client.infer("identity", [shared(8, 4)], outputs=[result_in(8, 32)])
    assert list(result.get_response().raw_output_contents) == [b""]
    found = shm.get_contents_as_numpy(region, np.uint8, [SIZE])
    assert found[32:40].tolist() == list(range(4, 12))
    assert found[:32].tolist() == list(range(32))
    assert found[40:].tolist() == list(range(40, SIZE))


def test_an_input_beside_one_on_the_wire(triton_client: triton.InferenceServerClient, region: object) -> None:
    result = triton_client.infer("identity", [shared(4)])
    assert result.as_numpy("OUTPUT0").tolist() == [0, 1, 2, 3]


def test_status_and_unregister(triton_client: triton.InferenceServerClient, region: object) -> None:
    found = triton_client.get_system_shared_memory_status("region").regions["region"]
    assert (found.key, found.offset, found.byte_size) == (KEY, 0, SIZE)
    triton_client.unregister_system_shared_memory("region")
    assert not triton_client.get_system_shared_memory_status().regions
    assert status_of(lambda: triton_client.get_system_shared_memory_status("region"))[0] == "NOT_FOUND"


def test_cuda_calls_succeed_where_nothing_is_registered(triton_client: triton.InferenceServerClient) -> None:
    triton_client.unregister_cuda_shared_memory("")
    assert not triton_client.get_cuda_shared_memory_status().regions


def test_kinds_are_told_apart(triton_client: triton.InferenceServerClient, region: object) -> None:
    triton_client.unregister_cuda_shared_memory("region")
    assert list(triton_client.get_system_shared_memory_status().regions) == ["region"]
    found = status_of(lambda: triton_client.get_cuda_shared_memory_status("region"))
    assert found == (
        "NOT_FOUND",
        "The region named 'region' is registered as system shared memory, not CUDA shared memory",
    )


def result_in(size: int, offset: int = 0, region: str = "region") -> triton.InferRequestedOutput:
    made = triton.InferRequestedOutput("OUTPUT0")
    made.set_shared_memory(region, size, offset)
    return made


Call = Callable[[triton.InferenceServerClient], object]
OUTSIDE: dict[str, tuple[Call, str, str]] = {
    "input past the end": (lambda c: c.infer("identity", [shared(8, SIZE - 4)]), "INVALID_ARGUMENT", "byte size"),
    "offset past the end": (lambda c: c.infer("identity", [shared(8, SIZE + 1)]), "INVALID_ARGUMENT", "Invalid offset"),
    "negative offset": (lambda c: c.infer("identity", [shared(8, -4)]), "INVALID_ARGUMENT", "shared_memory_offset"),
    "unknown": (lambda c: c.infer("identity", [shared(8, region="x")]), "NOT_FOUND", "Unable to find"),
    "duplicate": (lambda c: c.register_system_shared_memory("region", KEY, 8), "ALREADY_EXISTS", "already in manager"),
    "too large": (lambda c: c.register_system_shared_memory("r2", KEY, SIZE * 100), "INVALID_ARGUMENT", "byte size"),
    "absent": (lambda c: c.register_system_shared_memory("r2", "/zserve_absent", 8), "INTERNAL", "Unable to open"),
    "a path": (lambda c: c.register_system_shared_memory("r2", "/../../etc/passwd", 8), "INVALID_ARGUMENT", "key"),
    "output past the end": (
        lambda c: c.infer("identity", [some_bytes(8)], outputs=[result_in(8, SIZE - 4)]),
        "INVALID_ARGUMENT",
        "byte size",
    ),
    "output unknown": (
        lambda c: c.infer("identity", [some_bytes(8)], outputs=[result_in(8, region="x")]),
        "NOT_FOUND",
        "Unable to find",
    ),
}


@pytest.mark.parametrize("case", list(OUTSIDE))
def test_nothing_outside_what_was_registered(
    triton_client: triton.InferenceServerClient, region: object, case: str
) -> None:
    call, status, text = OUTSIDE[case]
    found = status_of(lambda: call(triton_client))
    assert found[0] == status
    assert text in found[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_shared_memory_says_what_it_needs(triton_client: triton.InferenceServerClient) -> None:
    found = status_of(lambda: triton_client.register_cuda_shared_memory("r", base64.b64encode(b"x" * 64), 0, 8))
    assert found[0] == "UNIMPLEMENTED"
    assert found[1].startswith("CUDA shared memory needs")
    assert "cuda_shared_memory" not in triton_client.get_server_metadata().extensions


def test_an_output_that_does_not_fit(triton_client: triton.InferenceServerClient, region: object) -> None:
    found = status_of(lambda: triton_client.infer("identity", [some_bytes(8)], outputs=[result_in(4)]))
    assert found[0] == "INVALID_ARGUMENT"
    assert "should be at least 8 bytes" in found[1]


@pytest.mark.parametrize(("output", "needed"), [("IMAGE", 2 * 64 * 80 * 3), ("SEED", 2 * 8)])
def test_nothing_is_drawn_where_the_output_is_known_not_to_fit(
    triton_client: triton.InferenceServerClient, output: str, needed: int
) -> None:
    before, room = ends(triton_client, MODEL), needed - 1
    parameters = {"width": 64, "height": 80, "num_images": 2, "num_inference_steps": 1}
    handle = shm.create_shared_memory_region("outputs", f"{KEY}_outputs", needed)
    triton_client.register_system_shared_memory("outputs", f"{KEY}_outputs", needed)
    try:
        wanted = triton.InferRequestedOutput(output)
        wanted.set_shared_memory("outputs", room)
        prompt = [bytes_tensor("PROMPT", "a star")]
        found = status_of(lambda: triton_client.infer(MODEL, prompt, outputs=[wanted], parameters=parameters))
        assert found[0] == "INVALID_ARGUMENT"
        assert f"'{output}' ({room} bytes) should be at least {needed} bytes" in found[1]
        assert ends(triton_client, MODEL) == before  # it has reached no queue
        wanted.set_shared_memory("outputs", needed)
        triton_client.infer(MODEL, prompt, outputs=[wanted], parameters=parameters)
    finally:
        triton_client.unregister_system_shared_memory("outputs")
        shm.destroy_shared_memory_region(handle)


def ends(client: triton.InferenceServerClient, model: str) -> tuple[int, int]:
    """Requests that have succeeded, and that have failed."""
    (figures,) = client.get_inference_statistics(model).model_stats
    return figures.inference_stats.success.count, figures.inference_stats.fail.count


def infer(client: triton.InferenceServerClient, model: str, inputs: list, **options: object) -> str:
    """Asks on a call of its own; returns the error."""
    return status_of(lambda: client.infer(model, inputs, **options))[1]


def stream(client: triton.InferenceServerClient, model: str, inputs: list, **options: object) -> str:
    answers: queue.Queue[InferenceServerException] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error))
    client.async_stream_infer(model, inputs, **options)
    error = answers.get(timeout=PATIENCE)
    client.stop_stream()
    return str(error)


SMALL = {"width": 64, "height": 64, "num_inference_steps": 1, "image_format": "png"}  # of a size not known before
ASKED = {
    "identity": ([some_bytes(8)], "OUTPUT0", {}),
    MODEL: ([bytes_tensor("PROMPT", "a star")], "IMAGE", {"parameters": SMALL}),
}


@pytest.mark.parametrize("ask", [infer, stream])
@pytest.mark.parametrize("model", list(ASKED))
def test_a_request_whose_answer_cannot_be_written_has_failed(
    triton_server: ServerProcess,
    triton_client: triton.InferenceServerClient,
    region: object,
    model: str,
    ask: Callable[..., str],
) -> None:
    """Whatever the model has made of it: its client has got an error."""
    inputs, output, options = ASKED[model]
    succeeded, failed = ends(triton_client, model)
    refused = triton_server.metric("zserve_requests_total", model=model, outcome="invalid_argument")
    small = triton.InferRequestedOutput(output)
    small.set_shared_memory("region", 4)
    assert "should be at least" in ask(triton_client, model, inputs, outputs=[small], **options)
    assert ends(triton_client, model) == (succeeded, failed + 1)
    if model == MODEL:
        assert triton_server.metric("zserve_requests_total", model=model, outcome="invalid_argument") == refused + 1


def test_memory_that_has_shrunk_is_an_error(triton_client: triton.InferenceServerClient, region: object) -> None:
    os.truncate(f"/dev/shm{KEY}", 8)
    assert status_of(lambda: triton_client.infer("identity", [shared(SIZE)]))[0] == "INVALID_ARGUMENT"
    os.truncate(f"/dev/shm{KEY}", SIZE)  # the client's own mapping would fault otherwise
    assert triton_client.infer("identity", [shared(8)]).as_numpy("OUTPUT0").size == 8


def test_it_is_off_by_default(identity_server: Callable[..., ServerProcess]) -> None:
    with triton.InferenceServerClient(identity_server().url) as client:
        found = status_of(lambda: client.register_system_shared_memory("region", KEY, SIZE))
        assert found == (
            "UNIMPLEMENTED",
            "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable.",
        )
        assert not [e for e in client.get_server_metadata().extensions if "shared_memory" in e]
