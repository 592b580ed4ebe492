"""What a worker answers: the request's own story, timed where it happened."""

import asyncio
import dataclasses
import time
from contextlib import aclosing

import numpy as np
import pytest

from export.manifest import Backend
from export.spec import Component
from server.errors import ShuttingDownError
from server.requests import Completed, EngineUse, Image, ImageFormat, Started
from server.worker.delivery import RECENT, TRANSIT, Delivery
from server.worker.events import FinishedImage, Listener, SequenceStarted
from server.worker.images import Pixels
from server.worker.sequences import ImageSequence
from server.worker.service import WorkerService
from tests.fakes import a_request

STAGE = 0.05  # seconds that the device works before the event loop hears of anything
ENCODING = 0.02  # seconds that an image takes to be encoded


class LateLoop:
    """A device thread whose events all reach the event loop when the work is done."""

    def __init__(self) -> None:
        self.seen: list[ImageSequence] = []

    def submit(self, sequences: tuple[ImageSequence, ...], listener: Listener) -> None:
        (sequence,) = sequences
        self.seen.append(sequence)
        listener(SequenceStarted(time.monotonic()))
        time.sleep(STAGE)
        sequence.seconds[Component.DENOISER] = STAGE
        sequence.engines = {c: EngineUse(c, Backend.EAGER, "") for c in Component}
        listener(FinishedImage(sequence, np.zeros((64, 64, 3), np.uint8)))

    def cancel(self, key: int) -> None:
        pass


class Tokenizer:
    def encode(self, *args: object) -> tuple[int, ...]:
        return (1, 2)


class Named:
    name = "worker"


async def test_no_time_is_counted_twice_when_the_event_loop_is_late() -> None:
    service = WorkerService(Named, Named, loop=LateLoop(), tokenizer=Tokenizer(), shift=3.0)  # type: ignore[arg-type]
    async with aclosing(service.generate(a_request())) as events:
        *_, completed = [event async for event in events]
    assert isinstance(completed, Completed)
    timings = completed.timings
    assert timings.denoise_ms == 1e3 * STAGE
    stages = timings.queue_ms + timings.encode_ms + timings.denoise_ms + timings.decode_ms + timings.image_encode_ms
    assert 1e3 * STAGE <= stages <= timings.total_ms


class SeveralLoop(LateLoop):
    """Begins with the images after 5, 10 ... seconds, the first of which encodes the prompt, and ends in reverse."""

    def submit(self, sequences: tuple[ImageSequence, ...], listener: Listener) -> None:
        began = time.monotonic()
        for number, sequence in enumerate(sequences):
            sequence.prompt_cached = number > 0
            sequence.engines = {c: EngineUse(c, Backend.EAGER, "") for c in Component}
            listener(SequenceStarted(began + 5.0 * (number + 1)))
        for sequence in reversed(sequences):
            listener(FinishedImage(sequence, np.zeros((64, 64, 3), np.uint8)))


async def test_a_request_of_several_images_has_begun_with_the_first_of_them() -> None:
    service = WorkerService(Named, Named, loop=SeveralLoop(), tokenizer=Tokenizer(), shift=3.0)  # type: ignore[arg-type]
    async with aclosing(service.generate(dataclasses.replace(a_request(), num_images=3))) as events:
        started, *images, completed = [event async for event in events]
    assert isinstance(started, Started)
    assert [image.index for image in images if isinstance(image, Image)] == [2, 1, 0]
    assert isinstance(completed, Completed)
    assert not completed.prompt_cached
    assert 5000 <= completed.timings.queue_ms < 10_000


class IdleLoop(LateLoop):
    """Takes requests, does nothing with them, and knows which have been cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled: list[int] = []

    def submit(self, sequences: tuple[ImageSequence, ...], listener: Listener) -> None:
        listener(SequenceStarted(time.monotonic()))

    def cancel(self, key: int) -> None:
        self.cancelled.append(key)


async def test_requests_under_way_fail_when_the_worker_is_told_to_stop() -> None:
    loop = IdleLoop()
    service = WorkerService(Named, Named, loop=loop, tokenizer=Tokenizer(), shift=3.0)  # type: ignore[arg-type]
    async with aclosing(service.generate(a_request())) as events:
        assert isinstance(await anext(events), Started)
        service.end_requests()
        with pytest.raises(ShuttingDownError, match="told to stop before the request was done"):
            await anext(events)
    assert len(loop.cancelled) == 1
    assert not service._listening


class KeepingLoop(LateLoop):
    """A device thread that is in the middle of a step when the process is told to end."""

    listener: Listener

    def submit(self, sequences: tuple[ImageSequence, ...], listener: Listener) -> None:
        self.listener = listener
        listener(SequenceStarted(time.monotonic()))


def test_a_step_that_ends_after_the_event_loop_does_not_end_the_devices_thread() -> None:
    """Which has yet to keep what engines have compiled."""
    loop = KeepingLoop()
    service = WorkerService(Named, Named, loop=loop, tokenizer=Tokenizer(), shift=3.0)  # type: ignore[arg-type]

    async def begin() -> None:
        async with aclosing(service.generate(a_request())) as events:
            await anext(events)

    asyncio.run(begin())
    loop.listener(SequenceStarted(time.monotonic()))


async def test_a_deadline_leaves_time_for_the_way_to_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(pixels: Pixels, image_format: ImageFormat, quality: int) -> bytes:
        time.sleep(ENCODING)
        return pixels.tobytes()

    monkeypatch.setattr("server.worker.service.encode_image", slowly)
    loop = LateLoop()
    service = WorkerService(Named, Named, loop=loop, tokenizer=Tokenizer(), shift=3.0)  # type: ignore[arg-type]
    request = dataclasses.replace(a_request(), timeout=60.0)
    for _ in range(2):
        async with aclosing(service.generate(request)) as events:
            assert [event async for event in events]
    untold, told = (s.claim.deadline - s.claim.arrived for s in loop.seen)
    assert untold == pytest.approx(60.0 - TRANSIT)
    assert told <= 60.0 - TRANSIT - ENCODING


def test_what_delivery_takes_is_of_the_format_and_grows_with_the_image() -> None:
    delivery = Delivery()
    for seconds in (0.002, 0.002, 9.0):
        delivery.observe(ImageFormat.JPEG, 1000, seconds)
    assert delivery.seconds(ImageFormat.JPEG, 4000) == pytest.approx(TRANSIT + 0.008)
    assert delivery.seconds(ImageFormat.PNG, 4000) == TRANSIT


def test_of_what_delivery_took_the_last_images_count() -> None:
    delivery = Delivery()
    for seconds in (*100 * (9.0,), *RECENT * (0.002,)):
        delivery.observe(ImageFormat.JPEG, 1000, seconds)
    assert delivery.seconds(ImageFormat.JPEG, 1000) == pytest.approx(TRANSIT + 0.002)
