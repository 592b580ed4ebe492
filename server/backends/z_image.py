"""`z_image`: the image model as tensors, over the same dispatcher and workers as the image service."""

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator
from dataclasses import replace

from server.backends.base import Host, ModelFolder, taking, unloaded
from server.backends.image_config import image_config
from server.config import ModelConfig, cpu_threads
from server.errors import ConfigError, EngineLoadError
from server.frontend.queue import ModelQueue
from server.frontend.workers import Worker, WorkerState
from server.launch import WorkerConfig
from server.requests import Completed, Image, Preview, Progress
from server.rpc.triton import image_model
from server.statistics import Statistics
from server.tensors import InferRequest, InferResponse

MOST_SOCKET_BYTES = 107  # of a socket's path (unix(7))


class ZImageModel:
    """One version of an image model: its queue and its workers."""

    def __init__(self, folder: ModelFolder, host: Host) -> None:
        self.spec = image_model.model_spec(folder)
        self._host = host
        self._config = image_config(folder.file)
        self._changed = asyncio.Event()
        configs = _worker_configs(folder, host, self._config)
        workers = [Worker(c, self._worker_changed, host.worker_command) for c in configs]
        self.queue = ModelQueue(self._config, workers)
        self.statistics: Statistics = self.queue.statistics

    @property
    def ready(self) -> bool:
        """See `Model`."""
        return self.queue.ready

    async def load(self) -> None:
        """See `Model`."""
        self._host.dispatcher.add(self.queue)
        for worker in self.queue.workers:
            worker.start()
        while any(w.state is WorkerState.STARTING for w in self.queue.workers):
            await self._changed.wait()
            self._changed.clear()
        if any(w.state is WorkerState.FAILED for w in self.queue.workers):
            raise EngineLoadError(self.queue.reason)
        self.queue.loaded = True

    def retire(self) -> None:
        """See `Model`."""
        self._host.dispatcher.remove(self.queue)

    async def unload(self) -> None:
        """See `Model`."""
        self.retire()
        # First, so that requests that lose their worker from now on do not wait for another.
        self.queue.close(unloaded(self.spec))
        await asyncio.gather(*(worker.stop() for worker in self.queue.workers))

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """See `Model`."""
        wanted = image_model.decode_request(request, self._config)
        finished: list[Image] = []
        async with taking(self._host.dispatcher.generate_on(self.queue, wanted.generation)) as events:
            async for event in events:
                match event:
                    case Progress() | Preview() if wanted.progress:
                        yield image_model.encode_progress(event)
                    case Image() if wanted.one_by_one:
                        finished.append(event)
                        yield image_model.encode_image(event, final=len(finished) == wanted.generation.num_images)
                    case Image():
                        finished.append(event)
                    case Completed() if not wanted.one_by_one:
                        yield image_model.encode_images(finished, event)

    def _worker_changed(self, worker: Worker) -> None:
        self.queue.change()  # not through the dispatcher, which has forgotten a retired queue
        self._changed.set()
        self._host.changed()


def _worker_configs(folder: ModelFolder, host: Host, model: ModelConfig) -> list[WorkerConfig]:
    # Without the levels' policies: only the queue here applies them, and they may be more than a command line holds.
    told = replace(model, queue=replace(model.queue, by_level=()))
    prefix = secrets.token_hex(3)  # two loads of one version may overlap; short, as a socket's path has to be
    longest = len(os.fsencode(host.sockets / f"{prefix}-{len(model.devices)}.sock"))
    if longest > MOST_SOCKET_BYTES:
        raise ConfigError(
            f"the path of a worker's socket in {host.sockets} would have {longest} bytes, and at most "
            f"{MOST_SOCKET_BYTES} are possible; start the server with a shorter TMPDIR"
        )
    return [
        WorkerConfig(
            folder=folder.path,
            model=told,
            version=folder.version,
            instance=f"{model.name}-{number}",
            socket=host.sockets / f"{prefix}-{number}.sock",
            device=host.config.device if device == "auto" else device,
            threads=cpu_threads(len(model.devices)),
            fallback=host.config.fallback,
            patience=host.config.worker_timeout_secs,
            start_patience=host.config.worker_start_timeout_secs,
            log=host.config.log,
        )
        for number, device in enumerate(model.devices)
    ]
