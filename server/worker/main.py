"""The worker process: load -> warm up -> serve on a Unix socket until told to stop.

Started by the frontend as `python -m server.worker.main` and a `WorkerConfig` as JSON. It serves only once it is warm,
so a worker that accepts connections is ready. It ends on SIGTERM, and by itself when its standard input closes, which
means that the frontend is gone, however it ended.
"""

import asyncio
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from export.checkpoint import Checkpoint
from export.devices import current_target, default_device
from export.errors import ExportError
from export.manifest import Manifest
from export.spec import Component
from export.validity import check_checkpoint
from server.config import ModelConfig
from server.costs import CostTable
from server.engines import memory
from server.engines.eager import EagerModules
from server.engines.load import EngineLoader
from server.engines.served import ServedComponent
from server.errors import ConfigError, EngineLoadError, ZServeError
from server.heap import keep_freed_memory, settle
from server.launch import WorkerConfig, announce
from server.requests import InstanceInfo, MemoryUse
from server.worker.batching import BatchPolicy
from server.worker.executor import Executor
from server.worker.loop import WorkerLoop
from server.worker.planner import Planner
from server.worker.process import ending_with_frontend, serve
from server.worker.prompts import PromptTokenizer
from server.worker.service import WorkerService
from server.worker.warmup import WarmUp

log = logging.getLogger(__name__)

# Heaps (malloc arenas) that a worker's threads share. With one per thread the worker grows on hosts with many cores;
# with two, encoding an image took three times as long.
HEAPS = 4

# Caption lengths in tokens that warm-up runs. On CUDA the first run of every new shape prepares its kernels, which may
# take as long as several steps; few prompts are longer than the last length.
CAPTIONS = {"cpu": (32,), "cuda": (32, 64, 96, 128)}
# Initial calls of a shape that are not representative: libraries initialise in the first, and on CUDA the second may be
# recorded as a graph.
PREPARING = {"cpu": 1, "cuda": 2}


def main() -> int:
    """Runs one worker; returns its exit status. A worker that cannot start says why on its standard output."""
    keep_freed_memory(arenas=HEAPS)
    config = WorkerConfig.parse(sys.argv[1:])
    config.log.apply(config.instance)
    parts = Parts()
    try:
        service = build_service(config, parts)
    except (ZServeError, ExportError, OSError) as error:
        sys.stdout.write(f"{error}\n")
        return 1
    except torch.OutOfMemoryError as error:
        sys.stdout.write(f"not enough memory to start ({memory.figures()}): {str(error).splitlines()[0]}\n")
        return 1
    settle()
    parts.done("heap")
    log.info("ready %s", parts)
    asyncio.run(serve(service, config.socket, service.end_requests))
    service.stop()
    return 0


@ending_with_frontend()
def build_service(config: WorkerConfig, parts: "Parts") -> WorkerService:
    """Loads the engines of a version, warms them up and starts the device's thread; `parts` records the stages."""
    # Between engine calls torch runs small operations, for which a second thread is not worth waiting: on two busy
    # cores, one thread made the median step 20 ms instead of 46 to 265 (benchmarks/preview.py). Engines that run on
    # torch use the threads they are given.
    torch.set_num_threads(1)
    parts.done("imports")
    device = _device(config.device)
    folder = config.folder / config.version
    manifest = Manifest.read(folder)
    model = _as_exported(config.model, manifest, check_checkpoint(manifest))
    parts.done("checkpoint")
    used = MemoryUse(host_before_load=memory.host_bytes(), device_before_load=memory.device_bytes())
    components = _load(config, folder, manifest, device)
    parts.done("weights and engines")
    executor = Executor(components, manifest, device, model.prompt_cache_size)
    costs = CostTable()
    batches = BatchPolicy(model.max_batch_size, model.queue.preferred_batch_sizes, model.queue.max_delay)
    loop = WorkerLoop(executor, Planner(costs, batches), patience=config.patience)
    loop.start()
    warm_up = WarmUp(executor, manifest.checkpoint.dimensions, announce, CAPTIONS[device], PREPARING[device])
    loop.call(lambda: warm_up.run(model, costs)).result()
    loop.call(executor.keep_kernels).result()
    parts.done("warm-up")
    used = replace(used, host_loaded=memory.host_bytes(), device_loaded=memory.device_bytes())

    device_name = _device_name(device, config.device)

    def describe() -> InstanceInfo:
        return InstanceInfo(
            name=config.instance,
            device=device_name,
            version=config.version,
            precision=manifest.precision,
            engines=executor.engines(),
            memory=replace(used, host_peak=memory.host_peak_bytes(), device_peak=memory.device_peak_bytes()),
            step_costs=costs.costs(),
        )

    tokenizer = PromptTokenizer(Path(manifest.checkpoint.path))
    parts.done("tokenizer")
    return WorkerService(model, describe, loop=loop, tokenizer=tokenizer, shift=manifest.checkpoint.shift)


class Parts:
    """The seconds that each stage of the start took, counted from the process's creation; for the log."""

    def __init__(self) -> None:
        self._began = self._last = psutil.Process().create_time()
        self._seconds: dict[str, float] = {}

    def done(self, part: str) -> None:
        """Records the time since the previous part as that of `part`."""
        now = time.time()
        self._seconds[part], self._last = now - self._last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._seconds.items())
        return f"after {self._last - self._began:.1f} s: {parts}"


def _device(asked: str) -> str:
    """The device to compute on, "cpu" or "cuda".

    Raises:
        EngineLoadError: the device is not available.
    """
    if asked == "auto":
        return default_device()
    device = _see_only(asked)
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineLoadError(
            f"there is no {asked} here, or CUDA_VISIBLE_DEVICES hides it; check instance_group in config.pbtxt, and "
            "--device"
        )
    return device


def _see_only(device: str) -> str:
    """Hides the other GPUs from this process, so that nothing lands on them; has to run before CUDA is used."""
    kind, _, index = device.partition(":")
    if index:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        mine = [index] if visible is None else visible.split(",")[int(index) :][:1]
        os.environ["CUDA_VISIBLE_DEVICES"] = "".join(mine)  # empty if there is no such index
    return kind


def _load(config: WorkerConfig, folder: Path, manifest: Manifest, device: str) -> dict[Component, ServedComponent]:
    loader = EngineLoader(
        folder=folder,
        manifest=manifest,
        target=current_target(device),
        modules=EagerModules(Path(manifest.checkpoint.path), manifest.precision, device),
        threads=config.threads,
        policy=config.fallback,
        disabled=config.disabled,
        announce=announce,
    )
    return loader.load_all()


def _as_exported(model: ModelConfig, manifest: Manifest, checkpoint: Checkpoint) -> ModelConfig:
    """`model` with batches no larger than its engines take: eager would have to run larger ones, as it does sizes.

    Raises:
        ConfigError: sizes are to be served that the checkpoint cannot draw.
    """
    if model.max_size > checkpoint.max_size:
        raise ConfigError(
            f"config.pbtxt allows max_size {model.max_size}, and the checkpoint draws up to {checkpoint.max_size} "
            "pixels a side; lower it"
        )
    if model.max_size > manifest.max_size:
        log.warning(
            "config.pbtxt allows max_size %d, and the engines were exported with --max-size %d: eager draws what is "
            "larger, slowly",
            *(model.max_size, manifest.max_size),
        )
    if model.max_batch_size > manifest.max_batch:
        log.warning(
            "config.pbtxt allows max_batch_size %d, and the engines were exported with --max-batch %d, which counts",
            *(model.max_batch_size, manifest.max_batch),
        )
    return replace(model, max_batch_size=min(model.max_batch_size, manifest.max_batch))


def _device_name(device: str, asked: str) -> str:
    name = device if asked == "auto" else asked
    return f"{name} ({torch.cuda.get_device_name(device)})" if device == "cuda" else name


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Skips Python's own shutdown: a device thread that returns from a step during it aborts the process.
    os._exit(status)
