"""A worker without a device and without torch: there in half a second, and its images cost nothing, however large.

A request whose prompt is the name of a file is held, once begun and with all steps but the last behind it, until that
file is there; two prompts end the process, one of them before it can say that it has begun.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from export.manifest import Backend
from export.spec import Component
from server.errors import ModelNotFoundError
from server.launch import WorkerConfig
from server.requests import (
    Completed,
    EngineUse,
    Event,
    GenerationRequest,
    Image,
    InstanceInfo,
    MemoryUse,
    Progress,
    Started,
    Timings,
)
from server.service import ModelStatus
from server.worker.process import serve

LIGHT = (sys.executable, "-m", "tests.integration.light_worker")
ENGINES = tuple(EngineUse(component, Backend.EAGER) for component in Component)
ENDS_AS_IT_IS_READ = "a prompt that is the end of whoever reads it"
ENDS_WITH_A_STEP = "a prompt that is the end of whoever draws it"
COMPUTED = Timings(encode_ms=1.0, denoise_ms=1.0, decode_ms=1.0)
CHATTER = "a worker may print as much as it likes\n" * 10_000  # more than a pipe holds


def is_shut(gate: str) -> bool:
    return Path(gate).is_absolute() and not Path(gate).exists()


class LightService:
    """Draws at once images of one grey, which the seed decides."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config, self._model = config, config.model
        self._device = asyncio.Lock()  # one request has it at a time, as in a worker without batches

    def model(self, name: str) -> ModelStatus:
        if name not in ("", self._model.name):
            raise ModelNotFoundError(name)
        info = InstanceInfo(self._config.instance, "none", self._config.version, "fp32", ENGINES, MemoryUse(), ())
        return ModelStatus(self._model, (info,), ready=True)

    def models(self) -> list[ModelStatus]:
        return [self.model("")]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        if request.prompt == ENDS_AS_IT_IS_READ:
            os.kill(os.getpid(), signal.SIGKILL)
        async with self._device, aclosing(self._draw(request)) as events:
            async for event in events:
                yield event

    async def _draw(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Started(self._config.instance)
        of = request.num_inference_steps
        for index in range(request.num_images):
            for step in range(1, of + 1):
                while step == of and is_shut(request.prompt):  # noqa: ASYNC110 - another process opens it
                    await asyncio.sleep(0.01)
                if request.prompt == ENDS_WITH_A_STEP:
                    await asyncio.sleep(0.1)  # what has been said is on its way
                    os.kill(os.getpid(), signal.SIGKILL)
                yield Progress(step, of, index)
            seed = request.seed + index
            grey = bytes([seed % 256]) * (3 * request.width * request.height)
            yield Image(index, seed, request.width, request.height, request.image_format, grey)
        yield Completed(COMPUTED, ENGINES, prompt_cached=False, denoiser_forwards=request.forwards)


def main() -> None:
    config = WorkerConfig.parse(sys.argv[1:])
    sys.stdout.write(CHATTER)
    sys.stdout.flush()
    asyncio.run(serve(LightService(config), config.socket))


if __name__ == "__main__":
    main()
