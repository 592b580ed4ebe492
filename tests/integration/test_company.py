"""Many at once: an image does not depend on its company, and everyone is answered once whatever happens."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from client import AsyncZImageClient, GenerationFailedError
from client.messages import GeneratedImage, ImageRequest
from demo.scenes import Scene, sample_scenes
from demo.score import score
from tests.conftest import MODEL
from tests.integration.frontend import Running, Seen, draw, make_repository, serving

CONFIG = """
max_batch_size: 4
instance_group { count: 2 kind: KIND_CPU }
dynamic_batching { default_queue_policy { max_queue_size: 300 } }
model_warmup { name: "96x64" }
parameters { key: "default_size" value { string_value: "64x64" } }
parameters { key: "default_num_inference_steps" value { string_value: "3" } }
"""
SIZES = ((64, 64), (64, 64), (96, 64), (64, 96), (128, 128))
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(repository, tmp_path_factory) -> AsyncIterator[Running]:  # type: ignore[no-untyped-def]
    models = make_repository(repository / MODEL, tmp_path_factory.mktemp("company"), CONFIG)
    async with serving(models) as running:
        await running.until(lambda: all(w.state.value == "ready" for w in running.workers))
        yield running


def pixels(seen: Seen) -> list[np.ndarray]:
    return [np.frombuffer(image.data, np.uint8).astype(np.int16) for image in seen.of("image")]


async def test_an_image_does_not_depend_on_its_company(server: Running) -> None:
    """The same eight requests one after another, all together, and among strangers of other sizes and guidance."""

    def wanted(seed: int, **changes: object) -> ImageRequest:
        return ImageRequest(f"a red circle {seed}", seed=seed, image_format="raw", **changes)  # type: ignore[arg-type]

    requests = [wanted(seed, num_inference_steps=3 + seed % 3) for seed in range(6)]
    requests += [wanted(6, guidance_scale=2.0, negative_prompt="a blue square"), wanted(7, num_images=3)]
    alone = [await draw(server.client, request) for request in requests]
    strangers = [wanted(seed, width=96, priority=1 + seed % 8) for seed in range(100, 108)]
    strangers += [wanted(seed, guidance_scale=3.0, num_inference_steps=5) for seed in range(200, 206)]
    for company in ([], strangers, [wanted(seed, num_inference_steps=2) for seed in range(300, 316)]):
        together = await asyncio.gather(*(draw(server.client, r) for r in (*requests, *company)))
        for one, other in zip(alone, together, strict=False):
            for mine, theirs in zip(pixels(one), pixels(other), strict=True):
                assert int(np.abs(mine - theirs).max()) <= 1


class Crowd:
    """200 clients: some leave early, some are in more of a hurry than the device can be."""

    def __init__(self, server: Running, hurried: AsyncZImageClient, patient: AsyncZImageClient) -> None:
        self.server, self.hurried, self.patient = server, hurried, patient
        self.rng = random.Random(20)
        self.scenes = sample_scenes(8, seed=5)
        self.outcomes: Counter[str] = Counter()
        self.right = 0

    async def until_answered(self, count: int) -> None:
        await self.server.until(lambda: self.outcomes["answered"] >= count)

    async def send(self, number: int) -> None:
        await asyncio.sleep(self.rng.random() * 2)
        if number < len(self.scenes):
            await self.scored(self.scenes[number], number)
        elif number % 10 == 0:
            await self.refused(number)
        elif number % 6 == 0:
            await self.left(number)
        else:
            await self.answered(number)

    async def scored(self, scene: Scene, number: int) -> None:
        request = ImageRequest(scene.prompt, width=256, height=256, num_inference_steps=8, seed=number, priority=2)
        seen = await draw(self.server.client, request)
        picture: Image.Image = GeneratedImage.from_message(seen.of("image")[0]).pillow()
        self.right += bool(score(np.asarray(picture), scene).all_correct)
        self.outcomes["scored"] += 1

    async def answered(self, number: int) -> None:
        client = self.patient if number % 3 else self.server.client
        seen = await draw(client, self.request(number))
        (completed,) = seen.of("completed")
        images = seen.of("image")
        assert [i.seed for i in sorted(images, key=lambda i: i.index)] == [number + k for k in range(len(images))]
        assert seen.kinds[-1] == "completed"
        assert [e.request_id for e in seen.events] == [str(number)] * len(seen.events)
        assert completed.denoiser_forwards == 3 * len(images)
        self.outcomes["answered"] += 1

    async def refused(self, number: int) -> None:
        with pytest.raises(GenerationFailedError) as failure:
            # More work than any machine does in this client's time.
            await draw(self.hurried, self.request(number, num_inference_steps=50, width=2048, height=2048))
        assert failure.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        self.outcomes["refused"] += 1

    async def left(self, number: int) -> None:
        stay = self.rng.randrange(4)
        events = self.server.client.generate(self.request(number, num_inference_steps=50))
        async for _ in events:
            if stay == 0:
                break
            stay -= 1
        await events.aclose()  # type: ignore[attr-defined]
        self.outcomes["left"] += 1

    def request(self, number: int, **changes: object) -> ImageRequest:
        width, height = self.rng.choice(SIZES)
        values = {"width": width, "height": height, "seed": number, "num_images": 1 + (number % 17 == 0)} | changes
        return ImageRequest(
            "a blue star", request_id=str(number), priority=self.rng.randint(1, 8), image_format="raw", **values
        )


async def test_200_at_once_with_two_workers_killed(server: Running) -> None:
    url = server.url
    tasks_before = len(asyncio.all_tasks())
    async with AsyncZImageClient(url, timeout=1.0) as hurried, AsyncZImageClient(url, timeout=3600.0) as patient:
        crowd = Crowd(server, hurried, patient)
        everyone = asyncio.gather(*(crowd.send(number) for number in range(200)))
        for victim, answered in zip(server.workers, (30, 100), strict=True):
            await crowd.until_answered(answered)
            # A request that was there when the other one was killed would be taken for what kills them.
            await server.until(
                lambda worker=victim: (
                    worker.state.value == "ready" and not any(p.suspect for p in server.queue.held(worker))
                )
            )
            os.kill(victim.pid or 0, signal.SIGKILL)
        await everyone
    assert crowd.outcomes == {"scored": 8, "refused": 19, "left": 26, "answered": 147}
    assert crowd.right >= 7
    await server.until(lambda: [w.restarts for w in server.workers] == [1, 1])
    await server.until(lambda: server.queue.waiting == server.queue.running == 0)
    await server.until(lambda: all(w.state.value == "ready" for w in server.workers))
    await server.until(lambda: len(asyncio.all_tasks()) <= tasks_before)
    (image,) = (await draw(server.client, ImageRequest("a red circle"))).of("image")
    assert (image.width, image.height) == (64, 64)
