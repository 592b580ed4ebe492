"""Too much work, and the end of it: refused with advice, cached, or finished; never left without an answer."""

import asyncio
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from client import GenerationFailedError
from client.messages import ImageRequest
from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc
from tests.integration.frontend import Running, draw, light_repository, serving
from tests.integration.light_worker import LIGHT

CONFIG = """
max_batch_size: 1
response_cache { enable: true }
dynamic_batching {
  default_queue_policy { max_queue_size: 3 }
  priority_queue_policy { key: 8 value { max_queue_size: 9 } }
}
parameters { key: "default_size" value { string_value: "64x64" } }
"""
NEVER = "/never"  # the file that `endless` requests wait for


def endless(seed: int, **options: object) -> ImageRequest:
    """Behind a gate that is never opened."""
    return ImageRequest(NEVER, seed=seed, **options)  # type: ignore[arg-type]


async def refusal(server: Running, request: ImageRequest) -> tuple[grpc.aio.AioRpcError, float]:
    """The error of a call, and the seconds that its RetryInfo advises to wait."""
    async with grpc.aio.insecure_channel(server.url) as channel:
        stub = pb_grpc.ImageGenerationStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.GenerateImage(request.to_message())
    details = dict(failure.value.trailing_metadata() or ())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)  # type: ignore[arg-type]
    assert (status.code, status.message) == (failure.value.code().value[0], failure.value.details())
    advice = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(advice)
    return failure.value, advice.retry_delay.ToMilliseconds() / 1e3


async def test_overload_cache_and_drain(tmp_path: Path) -> None:
    async with serving(light_repository(tmp_path, CONFIG), LIGHT, exit_timeout_secs=1.0) as server:
        await answers_come_from_the_cache(server)
        await overload_is_refused_with_advice(server)
        await everyone_is_answered_at_the_end(server)


async def answers_come_from_the_cache(server: Running) -> None:
    request = ImageRequest("a red circle", seed=1)
    first, second = await draw(server.client, request), await draw(server.client, request)
    assert [i.data for i in first.of("image")] == [i.data for i in second.of("image")]
    assert [s.of("completed")[0].response_cached for s in (first, second)] == [False, True]
    assert second.kinds == ["image", "completed"]
    other = await draw(server.client, ImageRequest("a red circle", seed=2))
    assert not other.of("completed")[0].response_cached
    figures = server.queue.statistics
    assert (figures.cache_hit.count, figures.cache_miss.count) == (1, 2)
    assert 0 < figures.cache_miss.ns < figures.stages["compute_infer"].ns  # looking up, not drawing
    assert (figures.success.count, figures.stages["queue"].count) == (3, 3)
    # What comes from the cache is answered, not inferred.
    assert (figures.inference_count, figures.execution_count, figures.stages["compute_infer"].count) == (2, 2, 2)


async def overload_is_refused_with_advice(server: Running) -> None:
    running = [asyncio.create_task(draw(server.client, endless(seed, priority=8))) for seed in range(10, 18)]
    await server.until(lambda: (server.queue.running, server.queue.waiting) == (2, 6))
    waiting = [asyncio.create_task(draw(server.client, endless(seed, priority=8))) for seed in range(20, 23)]
    await server.until(lambda: server.queue.waiting == 9)
    held = [asyncio.create_task(draw(server.client, endless(seed, priority=1))) for seed in range(30, 32)]
    await server.until(lambda: server.queue.running == 4)
    late = [asyncio.create_task(draw(server.client, endless(seed, priority=7))) for seed in range(40, 43)]
    await server.until(lambda: server.queue.waiting == 12)
    error, advised = await refusal(server, endless(50, priority=7))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert advised >= 1.0
    with pytest.raises(GenerationFailedError) as told:
        await draw(server.client, endless(51, priority=7))
    assert told.value.retry_after is not None
    assert told.value.retry_after >= 1.0
    for task in (*running, *waiting, *held, *late):
        task.cancel()
    await asyncio.gather(*running, *waiting, *held, *late, return_exceptions=True)
    await server.until(lambda: server.queue.waiting == server.queue.running == 0)


async def everyone_is_answered_at_the_end(server: Running) -> None:
    """What is not finished when the exit timeout has passed is refused in so many words."""
    calls = [asyncio.create_task(draw(server.client, endless(seed, priority=8))) for seed in range(60, 68)]
    await server.until(lambda: (server.queue.running, server.queue.waiting) == (2, 6))
    server.frontend.stop()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    refused = [e for e in ends if isinstance(e, GenerationFailedError)]
    assert len(refused) == 8
    assert {e.code for e in refused} == {grpc.StatusCode.UNAVAILABLE}
    assert all("shut down before" in e.details for e in refused)
