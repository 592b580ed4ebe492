"""What the frontend keeps of an answer, with a worker that is an ordinary object."""

import asyncio
import weakref
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

import pytest

from server.errors import ShuttingDownError
from server.frontend.dispatcher import Dispatcher
from server.frontend.metrics import Metrics
from server.frontend.workers import WorkerState
from server.requests import Completed, Event, GenerationRequest, Image, ImageFormat, InstanceInfo, Started, Timings
from tests.fakes import a_request
from tests.unit.server.test_cache import INSTANCE
from tests.unit.server.test_queue import FakeWorker, make

PATIENCE = 100.0  # seconds for what has to come about


@dataclass(eq=False)
class Painter(FakeWorker):
    """Makes two images, which it can tell whether anybody still has."""

    info: InstanceInfo = INSTANCE
    images: "list[weakref.ref[Image]]" = field(default_factory=list)

    @property
    def kept(self) -> int:
        return sum(image() is not None for image in self.images)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Started(self.name)
        for index in range(2):
            yield self._draw(index)
        yield Completed(Timings(), (), prompt_cached=False, denoiser_forwards=2)

    def _draw(self, index: int) -> Image:
        image = Image(index, 7, 64, 64, ImageFormat.RAW, b"")
        self.images.append(weakref.ref(image))
        return image


@pytest.mark.parametrize(("response_cache", "kept"), [(False, 0), (True, 2)])
async def test_images_that_the_client_has_taken_are_kept_for_a_response_cache_alone(
    response_cache: bool, kept: int
) -> None:
    painter = Painter()
    dispatcher = Dispatcher(Metrics(), cache_bytes=2**20)
    events = dispatcher.generate_on(make(painter, response_cache=response_cache), a_request())
    while not isinstance(await anext(events), Completed):
        pass
    assert painter.kept == kept
    await events.aclose()


async def test_answers_go_with_their_model() -> None:
    painter = Painter()
    dispatcher, queue = Dispatcher(Metrics(), cache_bytes=2**20), make(painter, response_cache=True)
    dispatcher.add(queue)
    async for _ in dispatcher.generate_on(queue, replace(a_request(), seed=7)):
        pass
    assert painter.kept == 2
    dispatcher.remove(queue)
    assert painter.kept == 0


@pytest.mark.parametrize("unloaded", [False, True])
async def test_an_answer_that_outlives_its_model_is_not_kept(unloaded: bool) -> None:
    """A client may be reading what a worker drew before its model went."""
    painter, request = Painter(), replace(a_request(), seed=7)
    dispatcher, queue = Dispatcher(Metrics(), cache_bytes=2**20), make(painter, response_cache=True)
    dispatcher.add(queue)
    events = dispatcher.generate_on(queue, request)
    await anext(events)
    if unloaded:
        dispatcher.remove(queue)
    assert [type(e) async for e in events][-1] is Completed
    again = [e async for e in dispatcher.generate_on(queue, request)]
    assert any(isinstance(e, Completed) and e.response_cached for e in again) is not unloaded


async def test_a_server_that_stops_takes_no_new_requests_and_says_when_to_try_again() -> None:
    dispatcher = Dispatcher(Metrics())
    dispatcher.add(make(Painter()))
    dispatcher.refuse_new()
    with pytest.raises(ShuttingDownError) as refusal:
        await anext(dispatcher.generate(a_request()))
    assert refusal.value.retry_after == 5.0


@pytest.mark.parametrize(
    ("loaded", "state", "answers"),
    [(True, WorkerState.READY, 1), (False, WorkerState.READY, 0), (True, WorkerState.RESTARTING, 0)],
)
async def test_the_latest_version_answers_if_it_is_loaded_and_serves(
    loaded: bool, state: WorkerState, answers: int
) -> None:
    versions = [Painter("old"), Painter("new", state)]
    dispatcher = Dispatcher(Metrics())
    for worker, whole in zip(versions, (True, loaded), strict=True):
        queue = make(worker)
        queue.loaded = whole
        dispatcher.add(queue)
    async with asyncio.timeout(PATIENCE):
        assert [type(e) async for e in dispatcher.generate(a_request())][-1] is Completed
    assert [bool(worker.images) for worker in versions] == [answers == number for number in range(2)]
