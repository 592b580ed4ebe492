"""How a worker answers `Generate`: from a decoded request through the loop to encoded images.

Runs on the event loop; tokenising and image encoding run in a thread pool, the device's work on the `WorkerLoop`.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from export.spec import Component
from server.config import ModelConfig
from server.errors import ModelNotFoundError, ShuttingDownError
from server.requests import (
    Completed,
    Event,
    GenerationRequest,
    Image,
    InstanceInfo,
    Preview,
    Progress,
    Queued,
    Started,
    Timings,
)
from server.service import ModelStatus
from server.worker.delivery import Delivery
from server.worker.events import Failed, FinishedImage, LoopEvent, PreviewPixels, SequenceStarted
from server.worker.images import Pixels, encode_image, encode_preview, joined, parts
from server.worker.loop import WorkerLoop
from server.worker.prompts import PromptTokenizer, TokenIds
from server.worker.sequences import ImageSequence, make_sequences

# Threads that tokenise and encode images. Each may touch a heap of its own for the first time: with one thread per core
# on 64 cores, a worker on an H200 grew by 87 MiB over 400 requests.
HOST_THREADS = 4
LAST_STEP = 1.0  # seconds that the device's thread has to end

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class _RequestState:
    """What is known of a request while it runs."""

    arrived: float
    started: float | None = None
    finished: list[ImageSequence] = field(default_factory=list)
    image_encode_seconds: float = 0.0


class WorkerService:
    """The `ImageService` of one worker. `describe` is called every time: engines, memory and costs change."""

    def __init__(
        self,
        model: ModelConfig,
        describe: Callable[[], InstanceInfo],
        *,
        loop: WorkerLoop,
        tokenizer: PromptTokenizer,
        shift: float,
    ) -> None:
        self._model, self._describe = model, describe
        self._loop, self._tokenizer, self._shift = loop, tokenizer, shift
        self._name = describe().name
        self._pool = ThreadPoolExecutor(max_workers=HOST_THREADS, thread_name_prefix="images")
        self._keys = itertools.count()
        self._delivery = Delivery()
        self._listening: set[asyncio.Queue[LoopEvent]] = set()  # those of the requests under way

    def end_requests(self) -> None:
        """Fails the requests under way: the process is to end, and they are no more waited for."""
        for events in self._listening:
            events.put_nowait(Failed(ShuttingDownError("the worker was told to stop before the request was done")))

    def stop(self) -> None:
        """Ends the device's thread, which keeps what engines have compiled, unless a step keeps it busy."""
        self._loop.stop()
        self._loop.join(LAST_STEP)

    def model(self, name: str) -> ModelStatus:
        """See `ImageService`."""
        if name not in ("", self._model.name):
            raise ModelNotFoundError(f"model {name!r} is not here; this worker serves {self._model.name!r}")
        alive = self._loop.alive
        reason = "" if alive else "the device has not come back from its last step"
        return ModelStatus(self._model, (self._describe(),), ready=alive, reason=reason)

    def models(self) -> list[ModelStatus]:
        """See `ImageService`."""
        return [self.model("")]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See `ImageService`."""
        state = _RequestState(arrived=time.monotonic())
        prompts = await self._tokenize(request)
        # Not the request's id: two clients may use the same one at the same time.
        key = next(self._keys)
        delivery = self._delivery.seconds(request.image_format, request.width * request.height)
        sequences = make_sequences(request, prompts, key=key, shift=self._shift, now=state.arrived, delivery=delivery)
        try:
            async with aclosing(self._submit(sequences)) as events:
                async for event in events:
                    if isinstance(event, Failed):
                        raise event.error
                    async for answer in self._answer(event, request, state):
                        yield answer
                    if len(state.finished) == request.num_images:
                        break
        finally:
            self._loop.cancel(key)
        yield self._completed(request, state)

    async def _tokenize(self, request: GenerationRequest) -> tuple[TokenIds, ...]:
        fields = {"prompt": request.prompt} | ({"negative_prompt": request.negative_prompt} if request.guided else {})
        return tuple(
            [
                await self._in_pool(self._tokenizer.encode, name, text, request.long_prompt)
                for name, text in fields.items()
            ]
        )

    async def _submit(self, sequences: tuple[ImageSequence, ...]) -> AsyncGenerator[LoopEvent, None]:
        """What the loop reports, carried from its thread to this event loop."""
        here = asyncio.get_running_loop()
        events: asyncio.Queue[LoopEvent] = asyncio.Queue()

        def listen(event: LoopEvent) -> None:
            with suppress(RuntimeError):  # the event loop is closed: the process is ending, and nobody listens
                here.call_soon_threadsafe(events.put_nowait, event)

        self._loop.submit(sequences, listen)
        self._listening.add(events)
        try:
            while True:
                yield await events.get()
        finally:
            self._listening.discard(events)

    async def _answer(self, event: LoopEvent, request: GenerationRequest, state: _RequestState) -> AsyncIterator[Event]:
        match event:
            case SequenceStarted(at):
                # The worker loop's own time: it begins the first stage before this event loop hears of it.
                if state.started is None:
                    state.started = at
                    yield Started(self._name)
            case Progress() | Queued():
                yield event
            case PreviewPixels(step, index, pixels):
                height, width, _ = pixels.shape
                yield Preview(step, index, await self._in_pool(encode_preview, pixels), width, height)
            case FinishedImage():
                yield await self._image(event, request, state)

    async def _image(self, event: FinishedImage, request: GenerationRequest, state: _RequestState) -> Image:
        began = time.monotonic()
        data = await self._encoded(event.pixels, request)
        seconds = time.monotonic() - began
        state.image_encode_seconds += seconds
        self._delivery.observe(request.image_format, request.width * request.height, seconds)
        state.finished.append(event.sequence)
        sequence = event.sequence
        return Image(
            sequence.image_index,
            sequence.seed,
            request.width,
            request.height,
            request.image_format,
            data,
            decode_ms=1e3 * sequence.seconds.get(Component.IMAGE_DECODER, 0.0),
            image_encode_ms=1e3 * seconds,
        )

    async def _encoded(self, pixels: Pixels, request: GenerationRequest) -> bytes:
        files = [
            self._in_pool(encode_image, part, request.image_format, request.quality)
            for part in parts(pixels, request.image_format)
        ]
        return joined(await asyncio.gather(*files), pixels)

    def _completed(self, request: GenerationRequest, state: _RequestState) -> Completed:
        seconds = {c: sum(s.seconds.get(c, 0.0) for s in state.finished) for c in Component}
        first, last = min(state.finished, key=lambda s: s.image_index), state.finished[-1]
        return Completed(
            Timings(
                queue_ms=1e3 * ((state.started or state.arrived) - state.arrived),
                encode_ms=1e3 * seconds[Component.PROMPT_ENCODER],
                denoise_ms=1e3 * seconds[Component.DENOISER],
                decode_ms=1e3 * seconds[Component.IMAGE_DECODER],
                image_encode_ms=1e3 * state.image_encode_seconds,
                total_ms=1e3 * (time.monotonic() - state.arrived),
            ),
            tuple(last.engines[c] for c in Component),
            prompt_cached=first.prompt_cached,
            denoiser_forwards=request.forwards,
        )

    async def _in_pool(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))
