"""ModelStreamInfer: decoupled models, order, in-band errors, progress and previews, cancellation."""

import io
import queue

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.conftest import MODEL
from tests.integration.process import PATIENCE, ServerProcess, wait_for
from tests.integration.triton.conftest import ENDLESS, bytes_tensor, some_bytes, tensor, under_way

Answer = tuple[triton.InferResult | None, InferenceServerException | None]


class Stream:
    """A stream of one client, and what has come on it."""

    def __init__(self, client: triton.InferenceServerClient, **headers: str) -> None:
        self.client = client
        self.answers: queue.Queue[Answer] = queue.Queue()
        client.start_stream(lambda result, error: self.answers.put((result, error)), headers=headers)

    def result(self) -> triton.InferResult:
        result, error = self.answers.get(timeout=PATIENCE)
        assert error is None, error
        assert result is not None
        return result

    def error(self) -> InferenceServerException:
        result, error = self.answers.get(timeout=PATIENCE)
        assert error is not None, result
        return error

    def empty(self) -> bool:
        self.client.stop_stream()
        return self.answers.empty()


def final(result: triton.InferResult) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def number(value: int = 4) -> triton.InferInput:
    return tensor("INPUT0", np.array([value], dtype=np.int32), "INT32")


def test_a_decoupled_model_answers_as_often_as_it_likes(triton_client: triton.InferenceServerClient) -> None:
    stream = Stream(triton_client)
    triton_client.async_stream_infer("repeat", [number()], request_id="r", parameters={"repeat": 3})
    results = [stream.result() for _ in range(3)]
    assert [final(r) for r in results] == [False, False, True]
    assert {r.get_response().id for r in results} == {"r"}
    assert stream.empty()


@pytest.mark.parametrize("wanted", [True, False])
def test_the_empty_final_response_comes_only_on_request(
    triton_client: triton.InferenceServerClient, wanted: bool
) -> None:
    stream = Stream(triton_client)
    triton_client.async_stream_infer(
        "repeat",
        [number()],
        request_id="none",
        parameters={"repeat": 0},
        enable_empty_final_response=wanted,
    )
    if wanted:
        result = stream.result()
        assert final(result)
        assert not result.get_response().outputs
        assert result.get_response().id == "none"
    assert stream.empty()


def test_other_models_answer_in_the_order_of_the_requests(triton_client: triton.InferenceServerClient) -> None:
    stream = Stream(triton_client)
    for name, delay in (("slow", 300), ("fast", 0)):
        triton_client.async_stream_infer(
            "versions", [some_bytes()], request_id=name, parameters={"execute_delay_ms": delay}
        )
    assert [stream.result().get_response().id for _ in range(2)] == ["slow", "fast"]


def test_decoupled_models_may_overtake(triton_client: triton.InferenceServerClient) -> None:
    stream = Stream(triton_client)
    triton_client.async_stream_infer("identity", [some_bytes()], request_id="slow", parameters=ENDLESS)
    triton_client.async_stream_infer("repeat", [number()], request_id="fast")
    assert stream.result().get_response().id == "fast"
    triton_client.stop_stream(cancel_requests=True)


def test_an_error_leaves_the_stream_open(triton_client: triton.InferenceServerClient) -> None:
    stream = Stream(triton_client)
    triton_client.async_stream_infer("no_such_model", [some_bytes()], request_id="bad")
    assert "unknown model" in stream.error().message()
    triton_client.async_stream_infer("identity", [some_bytes()], request_id="good")
    assert stream.result().get_response().id == "good"


def test_half_a_response_cannot_be_asked_for(triton_client: triton.InferenceServerClient) -> None:
    stream = Stream(triton_client)
    triton_client.async_stream_infer("repeat", [number()], parameters={"repeat": "1.5"})
    assert "repeat: 1.5 is not accepted; a whole number from 0 to 100000 is" in stream.error().message()


def test_an_error_ends_the_stream_where_the_client_wants_that(triton_client: triton.InferenceServerClient) -> None:
    stream = Stream(triton_client, triton_grpc_error="true")
    triton_client.async_stream_infer("no_such_model", [some_bytes()])
    assert stream.error().status() == "StatusCode.NOT_FOUND"


def test_progress_and_previews_on_request(triton_client: triton.InferenceServerClient) -> None:
    stream = Stream(triton_client)
    triton_client.async_stream_infer(
        MODEL, [bytes_tensor("PROMPT", "a blue square")], parameters={"progress": True, "preview_interval": 3}
    )
    results = []
    while not results or not final(results[-1]):
        results.append(stream.result())
    events = [r.get_response().parameters["event"].string_param for r in results]
    assert events.count("progress") == 8
    assert events.count("preview") == 2
    assert events[-1] == "image"
    preview = results[events.index("preview")].as_numpy("IMAGE")[0]
    assert Image.open(io.BytesIO(preview)).size == (32, 32)
    assert results[-1].as_numpy("IMAGE").shape == (256, 256, 3)
    assert stream.empty()


def test_without_it_there_is_the_image_alone(triton_client: triton.InferenceServerClient) -> None:
    stream = Stream(triton_client)
    steps = {"num_inference_steps": 1, "num_images": 2}
    triton_client.async_stream_infer(MODEL, [bytes_tensor("PROMPT", "a blue square")], parameters=steps)
    result = stream.result()
    assert final(result)
    assert result.as_numpy("IMAGE").shape == (2, 256, 256, 3)
    assert stream.empty()


def test_a_cancelled_stream_ends_its_requests(
    triton_server: ServerProcess, triton_client: triton.InferenceServerClient
) -> None:
    def cancelled() -> float:
        return triton_server.metric("nv_inference_request_failure", model="repeat", reason="CANCELED")

    before = cancelled()
    Stream(triton_client)
    triton_client.async_stream_infer("repeat", [number()], parameters=ENDLESS)
    wait_for(lambda: under_way(triton_server, "repeat") == 1)
    triton_client.stop_stream(cancel_requests=True)
    wait_for(lambda: cancelled() == before + 1)
    wait_for(lambda: under_way(triton_server, "repeat") == 0)


async def test_streams_in_asyncio(triton_server: ServerProcess) -> None:
    async def requests():  # type: ignore[no-untyped-def]
        for name in ("a", "b"):
            yield {"model_name": "repeat", "inputs": [number()], "request_id": name, "parameters": {"repeat": 2}}

    async with triton_aio.InferenceServerClient(triton_server.url) as client:
        ids = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            ids.append(result.get_response().id)
    assert sorted(ids) == ["a", "a", "b", "b"]
