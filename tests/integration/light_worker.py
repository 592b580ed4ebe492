"""A worker without a device and without torch: there in half a second, and its images cost nothing, however large.

A request whose prompt is the name of a file is held, once begun, until that file is there.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from export.manifest import Backend
from export.spec import Component
from server.config import ModelConfig, read_model_config
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
CHATTER = "a worker may print as much as it likes\n" * 10_000  # more than a pipe holds


def is_shut(gate: str) -> bool:
    return Path(gate).is_absolute() and not Path(gate).exists()


class LightService:
    """Draws black images at once."""

    def __init__(self, config: WorkerConfig, model: ModelConfig) -> None:
        self._config, self._model = config, model

    def model(self, name: str) -> ModelStatus:
        if name not in ("", self._model.name):
            raise ModelNotFoundError(name)
        info = InstanceInfo(self._config.instance, "none", self._config.version, "fp32", ENGINES, MemoryUse(), ())
        return ModelStatus(self._model, (info,), ready=True)

    def models(self) -> list[ModelStatus]:
        return [self.model("")]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Started(self._config.instance)
        while is_shut(request.prompt):  # noqa: ASYNC110 - another process opens it
            await asyncio.sleep(0.01)
        of = request.num_inference_steps
        for index in range(request.num_images):
            for step in range(1, of + 1):
                yield Progress(step, of, index)
            black = bytes(3 * request.width * request.height)
            yield Image(index, request.seed + index, request.width, request.height, request.image_format, black)
        yield Completed(Timings(), ENGINES, prompt_cached=False, denoiser_forwards=request.forwards)


def main() -> None:
    config = WorkerConfig.parse(sys.argv[1:])
    sys.stdout.write(CHATTER)
    sys.stdout.flush()
    asyncio.run(serve(LightService(config, read_model_config(config.accepted)), config.socket))


if __name__ == "__main__":
    main()
