"""What a worker answers: the request's own story, timed where it happened."""

import time
from contextlib import aclosing

import numpy as np

from export.manifest import Backend
from export.spec import Component
from server.requests import Completed, EngineUse
from server.worker.events import FinishedImage, Listener, SequenceStarted
from server.worker.executor import ImageSequence
from server.worker.service import WorkerService
from tests.fakes import a_request

STAGE = 0.05  # seconds that the device works before the event loop hears of anything


class LateLoop:
    """A device thread whose events all reach the event loop when the work is done."""

    def submit(self, sequences: tuple[ImageSequence, ...], listener: Listener) -> None:
        (sequence,) = sequences
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
