"""Unmodified tritonclient against a real server: the model as tensors, sync, async and asyncio."""

import asyncio
import io
import queue

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from demo.scenes import sample_scenes
from demo.score import score
from tests.conftest import MODEL
from tests.integration.process import PATIENCE, ServerProcess, wait_for
from tests.integration.triton.conftest import ENDLESS, NUMBERS, bytes_tensor, some_bytes, tensor, under_way

PROMPT = "a red circle on a white background"


def test_health_and_metadata(triton_client: triton.InferenceServerClient) -> None:
    assert triton_client.is_server_live()
    assert triton_client.is_server_ready()
    assert triton_client.is_model_ready(MODEL)
    assert triton_client.is_model_ready("versions", "1")
    server = triton_client.get_server_metadata()
    assert server.name == "triton"
    assert "statistics" in server.extensions
    assert "system_shared_memory" in server.extensions
    model = triton_client.get_model_metadata(MODEL)
    assert model.platform == "z_image"
    assert [(o.name, o.datatype, list(o.shape)) for o in model.outputs] == [
        ("IMAGE", "UINT8", [-1, -1, 3]),
        ("SEED", "INT64", [-1]),
    ]
    assert list(triton_client.get_model_metadata("versions").versions) == ["1", "3"]
    assert list(triton_client.get_model_metadata("batched").inputs[0].shape) == [-1, -1]


def test_config_is_complete(triton_client: triton.InferenceServerClient) -> None:
    config = triton_client.get_model_config(MODEL).config
    optional = {t.name: t.optional for t in config.input}
    assert optional.pop("PROMPT") is False
    assert set(optional.values()) == {True}
    assert config.parameters["default_size"].string_value == "256x256"
    assert triton_client.get_model_config("repeat").config.model_transaction_policy.decoupled
    assert triton_client.get_model_config("batched").config.max_batch_size == 8


def test_an_image_as_tensors(triton_client: triton.InferenceServerClient) -> None:
    result = triton_client.infer(MODEL, [bytes_tensor("PROMPT", PROMPT)], request_id="one", parameters={"seed": 7})
    assert result.as_numpy("IMAGE").shape == (256, 256, 3)
    assert result.as_numpy("SEED").tolist() == [7]
    response = result.get_response()
    assert (response.id, response.model_name) == ("one", MODEL)
    assert int(response.model_version) > 0
    assert response.parameters["engine_denoiser"].string_param == "onnxruntime"
    assert response.parameters["denoise_ms"].double_param > 0


def test_tensors_and_parameters_mean_the_same(triton_client: triton.InferenceServerClient) -> None:
    size = np.array([128], dtype=np.int32)
    inputs = [
        bytes_tensor("PROMPT", PROMPT),
        tensor("WIDTH", size, "INT32"),
        tensor("HEIGHT", size, "INT32"),
        tensor("NUM_INFERENCE_STEPS", np.array([2], dtype=np.int32), "INT32"),
        tensor("SEED", np.array([11], dtype=np.int64), "INT64"),
    ]
    by_tensors = triton_client.infer(MODEL, inputs)
    scalars = {"width": 128, "height": "128", "num_inference_steps": 2, "seed": 11}
    by_parameters = triton_client.infer(MODEL, inputs[:1], parameters=scalars)
    assert (by_tensors.as_numpy("IMAGE") == by_parameters.as_numpy("IMAGE")).all()
    assert by_tensors.as_numpy("IMAGE").shape == (128, 128, 3)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_encoded_images(triton_client: triton.InferenceServerClient, image_format: str) -> None:
    inputs = [bytes_tensor("PROMPT", PROMPT), bytes_tensor("IMAGE_FORMAT", image_format)]
    steps = {"num_inference_steps": 1, "num_images": 2, "width": 128, "height": 64, "seed": 3}
    result = triton_client.infer(MODEL, inputs, parameters=steps)
    pictures = [Image.open(io.BytesIO(data)) for data in result.as_numpy("IMAGE")]
    assert [(p.format, p.size) for p in pictures] == [(image_format.upper(), (128, 64))] * 2
    assert result.as_numpy("SEED").tolist() == [3, 4]


def test_the_image_is_what_was_asked(triton_client: triton.InferenceServerClient) -> None:
    scene = sample_scenes(1, seed=3)[0]
    result = triton_client.infer(MODEL, [bytes_tensor("PROMPT", scene.prompt)], parameters={"seed": 1})
    assert score(result.as_numpy("IMAGE"), scene).all_correct


def test_every_number_comes_back(triton_client: triton.InferenceServerClient) -> None:
    kinds = [np.dtype(k.lower().replace("fp", "float")) for k in NUMBERS]
    values = [np.array([0, 1, 1, 0]).astype(kind) for kind in kinds]
    inputs = [tensor(f"INPUT{i}", v, name) for i, (v, name) in enumerate(zip(values, NUMBERS, strict=True))]
    result = triton_client.infer("numbers", inputs)
    for i, expected in enumerate(values):
        found = result.as_numpy(f"OUTPUT{i}")
        assert found.dtype == expected.dtype
        assert (found == expected).all()


def test_typed_contents(triton_client: triton.InferenceServerClient) -> None:
    request = triton.service_pb2.ModelInferRequest(model_name="two")
    request.inputs.add(name="INPUT0", datatype="INT32", shape=[2]).contents.int_contents.extend([-5, 6])
    request.inputs.add(name="INPUT1", datatype="BYTES", shape=[1]).contents.bytes_contents.append("日本".encode())
    response = triton_client._client_stub.ModelInfer(request)
    assert np.frombuffer(response.raw_output_contents[0], np.int32).tolist() == [-5, 6]
    assert response.raw_output_contents[1][4:].decode() == "日本"


def test_only_the_outputs_asked_for(triton_client: triton.InferenceServerClient) -> None:
    inputs = [tensor("INPUT0", np.array([1], dtype=np.int32), "INT32"), bytes_tensor("INPUT1", "a")]
    result = triton_client.infer("two", inputs, outputs=[triton.InferRequestedOutput("OUTPUT1")])
    assert [o.name for o in result.get_response().outputs] == ["OUTPUT1"]
    assert len(result.get_response().raw_output_contents) == 1


@pytest.mark.parametrize("number", [7, "seven"])
def test_requests_of_a_sequence_are_answered_like_any_other(
    triton_client: triton.InferenceServerClient, number: int | str
) -> None:
    """As in Triton, where a model has no sequence batching: no start, or two ends, is no error either."""
    for flags in ({}, {"sequence_start": True}, {"sequence_end": True}, {"sequence_end": True}):
        result = triton_client.infer("identity", [some_bytes()], sequence_id=number, **flags)
        assert result.as_numpy("OUTPUT0").size == 5


def test_large_and_empty_payloads(triton_client: triton.InferenceServerClient) -> None:
    for count in (0, 20_000_000):
        result = triton_client.infer("identity", [some_bytes(count)])
        assert result.as_numpy("OUTPUT0").nbytes == count


def test_unicode_comes_back(triton_client: triton.InferenceServerClient) -> None:
    texts = ["", "naïve", "水墨画", "🎨\u200d", "a\0b"]
    result = triton_client.infer("text", [bytes_tensor("INPUT0", *texts)], request_id="прошу")
    assert [t.decode() for t in result.as_numpy("OUTPUT0")] == texts
    assert result.get_response().id == "прошу"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression(triton_client: triton.InferenceServerClient, algorithm: str) -> None:
    result = triton_client.infer("identity", [some_bytes(100_000)], compression_algorithm=algorithm)
    assert result.as_numpy("OUTPUT0").shape == (100_000,)


def test_versions(triton_client: triton.InferenceServerClient) -> None:
    newest = triton_client.infer("versions", [some_bytes()])
    oldest = triton_client.infer("versions", [some_bytes()], model_version="1")
    assert (newest.get_response().model_version, oldest.get_response().model_version) == ("3", "1")


def test_async_callbacks(triton_client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[tuple[triton.InferResult | None, InferenceServerException | None]] = queue.Queue()
    for number in range(10):
        triton_client.async_infer(
            "identity", [some_bytes(number + 1)], lambda result, error: answers.put((result, error))
        )
    sizes = []
    for _ in range(10):
        result, error = answers.get(timeout=PATIENCE)
        assert error is None
        assert result is not None
        sizes.append(result.as_numpy("OUTPUT0").size)
    assert sorted(sizes) == list(range(1, 11))


def test_requests_that_arrive_together_are_batched(triton_client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[triton.InferResult] = queue.Queue()
    for number in range(4):
        values = np.full((2, 3), number, dtype=np.float32)
        triton_client.async_infer(
            "full_batches", [tensor("INPUT0", values, "FP32")], lambda result, error: answers.put(result or error)
        )
    rows = sorted(answers.get(timeout=PATIENCE).as_numpy("OUTPUT0")[0, 0] for _ in range(4))
    assert rows == [0, 1, 2, 3]
    (figures,) = triton_client.get_inference_statistics("full_batches").model_stats
    assert figures.inference_count == 8
    assert figures.execution_count == 1
    assert [b.batch_size for b in figures.batch_stats] == [8]


async def test_asyncio(triton_server: ServerProcess) -> None:
    async with triton_aio.InferenceServerClient(triton_server.url) as client:
        assert await client.is_server_ready()
        results = await asyncio.gather(*(client.infer("identity", [some_bytes(n)]) for n in range(1, 9)))
        assert [r.as_numpy("OUTPUT0").size for r in results] == list(range(1, 9))


def test_parameters_are_taken_as_triton_takes_them(triton_client: triton.InferenceServerClient) -> None:
    """A priority that the model does not have is its default; whole numbers may come as doubles and as text."""
    wanted = {"num_inference_steps": 1.0, "width": "64", "height": 64, "preview_interval": "0", "progress": "false"}
    for priority in (0, 8, 9, 2**32, 2**64 - 1):
        prompt = bytes_tensor("PROMPT", PROMPT)
        result = triton_client.infer(MODEL, [prompt], parameters=wanted, priority=priority)
        assert result.as_numpy("IMAGE").shape == (64, 64, 3)


def cancelled(client: triton.InferenceServerClient, model: str) -> int:
    (figures,) = client.get_inference_statistics(model).model_stats
    return int(figures.inference_stats.fail.count)


def test_a_cancelled_call_ends_on_the_server(
    triton_server: ServerProcess, triton_client: triton.InferenceServerClient
) -> None:
    before = cancelled(triton_client, "identity")
    errors: queue.Queue[InferenceServerException] = queue.Queue()
    call = triton_client.async_infer(
        "identity", [some_bytes()], lambda result, error: errors.put(error), parameters=ENDLESS
    )
    wait_for(lambda: under_way(triton_server, "identity") == 1)
    call.cancel()
    assert errors.get(timeout=PATIENCE).status() == "StatusCode.CANCELLED"
    wait_for(lambda: cancelled(triton_client, "identity") == before + 1)
    wait_for(lambda: under_way(triton_server, "identity") == 0)
    assert triton_client.infer("identity", [some_bytes()]).as_numpy("OUTPUT0").size == 5


def test_a_cancelled_image_frees_its_place(
    triton_server: ServerProcess, triton_client: triton.InferenceServerClient
) -> None:
    before = cancelled(triton_client, MODEL)
    call = triton_client.async_infer(
        MODEL,
        [bytes_tensor("PROMPT", PROMPT)],
        lambda result, error: None,
        parameters={"num_inference_steps": 50, "num_images": 4, "width": 512, "height": 512},
    )
    wait_for(lambda: under_way(triton_server, MODEL) == 1)
    call.cancel()
    wait_for(lambda: cancelled(triton_client, MODEL) == before + 1)
    assert triton_server.metric("nv_inference_request_failure", model=MODEL, reason="CANCELED") >= 1


async def test_cancellation_from_asyncio(triton_server: ServerProcess) -> None:
    async with triton_aio.InferenceServerClient(triton_server.url) as client:
        task = asyncio.create_task(client.infer("identity", [some_bytes()], parameters=ENDLESS))
        await asyncio.to_thread(wait_for, lambda: under_way(triton_server, "identity") == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await client.infer("identity", [some_bytes()])).as_numpy("OUTPUT0").size == 5


def test_a_deadline(triton_client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        triton_client.infer("identity", [some_bytes()], client_timeout=0.2, parameters=ENDLESS)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert caught.value.message() == "Deadline Exceeded"
