"""The frontend's life: listen -> start workers -> serve -> drain -> stop."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import grpc.aio

from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc
from server.backends.base import Host, Model
from server.config import ControlMode, FallbackPolicy, ServeConfig
from server.errors import ConfigError, ModelNotFoundError, OvertakenError, ZServeError
from server.frontend.dispatcher import Dispatcher
from server.frontend.gauges import CpuGauges, Gauges, GpuGauges, Source
from server.frontend.gpus import open_gpus
from server.frontend.metrics import Metrics
from server.frontend.queue import ModelQueue
from server.frontend.repository import Repository
from server.frontend.scratch import scratch_folder
from server.frontend.telemetry import Telemetry
from server.frontend.trace_file import append_trace
from server.frontend.triton_metrics import TritonCollector
from server.frontend.workers import COMMAND
from server.heap import keep_freed_memory, settle
from server.rpc.access import AccessInterceptor
from server.rpc.health import Health, enable_reflection
from server.rpc.interceptors import ErrorInterceptor
from server.rpc.listen import bind, make_server
from server.rpc.tracing import TracedImageGenerationServicer
from server.rpc.triton import servicer as triton
from server.rpc.triton.errors import translate
from server.rpc.triton.servicer import ServerState, TritonServer
from server.rpc.triton.shared_memory import SharedMemory
from server.settings import TraceMode
from server.signals import stopping_signals
from server.tracing import Tracer

log = logging.getLogger(__name__)

STOP_GRACE = 1.0  # seconds for calls that are still open when everything has been answered


class Frontend:
    """One server over one model repository."""

    def __init__(self, config: ServeConfig, sockets: Path, worker_command: Sequence[str] = COMMAND) -> None:
        self.port = 0  # the one clients connect to; known after `until_ready`
        self._config = config
        self._metrics = Metrics()
        self._dispatcher = Dispatcher(
            self._metrics, max_retries=config.max_retries, cache_bytes=config.response_cache_byte_size
        )
        self._health = Health()
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._started = asyncio.Event()  # what was to be loaded at the start is, or has failed to load
        self._absent: set[str] = set()  # models that were to be loaded at the start, have no folder, and are not loaded
        self._state = ServerState()
        self._memory = SharedMemory(allowed=config.allow_client_shm)
        self._tracer = _tracer(config, self._metrics)
        host = Host(config, self._dispatcher, sockets, self._changed.set, worker_command)
        self._repository = Repository(config.model_repository, host)

    def stop(self) -> None:
        """Makes `run` drain, then stop."""
        self._stop.set()

    @property
    def queues(self) -> list[ModelQueue]:
        """The queues of all image models."""
        return self._dispatcher.queues()

    async def until_ready(self) -> None:
        """Returns when every model that is to be loaded at the start has been, or has failed to."""
        await self._started.wait()

    async def until_stopping(self) -> None:
        """Returns when it has been told to stop, by `stop` or a signal."""
        await self._stop.wait()

    async def run(self) -> int:
        """Serves until a signal says to stop; returns the exit status."""
        for number in stopping_signals():  # before it listens: from then on it has to end in order
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        names = self._names_at_start()
        server = await self._listen()
        self._metrics.watch(self._dispatcher.queues, self._readiness)
        try:
            stop_metrics = await self._serve_metrics()
        except ConfigError:
            await server.stop(None)
            raise
        loading = asyncio.create_task(self._load(names))
        tasks = [loading, asyncio.create_task(self._follow_readiness()), asyncio.create_task(self._poll(loading))]
        try:
            await self._stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._shut_down(server)
            stop_metrics()
        return 1 if loading.done() and not loading.cancelled() and loading.result() else 0

    async def _serve_metrics(self) -> Callable[[], None]:
        if not self._config.allow_metrics:
            return lambda: None
        self._metrics.registry.register(TritonCollector(self._repository.loaded, self._config.metrics))
        gauges = await asyncio.to_thread(_start_gauges, self._config)
        self._metrics.registry.register(gauges)
        address, port = self._config.metrics_address, self._config.metrics_port
        try:
            stop_serving = self._metrics.serve(address, port)
        except OSError as error:
            gauges.stop()
            raise ConfigError(f"no metrics at --metrics-address {address}, --metrics-port {port}: {error}") from error

        def stop() -> None:
            stop_serving()
            gauges.stop()

        return stop

    def _names_at_start(self) -> list[str]:
        """The models to load before any client asks."""
        names = self._repository.names()
        if self._config.model_control_mode is ControlMode.EXPLICIT:
            wanted = self._config.load_model
            return names if "*" in wanted else list(wanted)
        if not names and self._config.model_control_mode is ControlMode.NONE:
            path = self._config.model_repository
            raise ConfigError(f"the model repository {path} is empty; fill it with `zserve export --repository {path}`")
        return names

    async def _listen(self) -> grpc.aio.Server:
        config = self._config.grpc
        errors = ErrorInterceptor({triton.SERVICE_NAME: translate})
        limited = config.restrictions or config.max_calls_per_client
        server = make_server(config, [errors, AccessInterceptor(config)] if limited else [errors])
        pb_grpc.add_ImageGenerationServicer_to_server(
            TracedImageGenerationServicer(self._dispatcher, self._tracer), server
        )
        context = TritonServer(
            self._config, version("zserve"), self._repository, self._state, self._memory, self._tracer
        )
        triton.add_to(server, context)
        self._health.add_to(server)
        enable_reflection(server)
        self.port = bind(server, config)
        await server.start()
        log.info("gRPC on %s:%d", config.address, self.port)
        return server

    async def _load(self, names: list[str]) -> bool:
        """Loads `names`; True if the server has to exit because that failed."""
        results = await asyncio.gather(*(self._repository.load(name) for name in names), return_exceptions=True)
        self._absent = {n for n, r in zip(names, results, strict=True) if isinstance(r, ModelNotFoundError)}
        for name in self._absent:
            log.error("cannot load model %s: it has no folder in %s", name, self._config.model_repository)
        self._started.set()
        self._changed.set()
        failures = [r for r in results if isinstance(r, BaseException) and not isinstance(r, OvertakenError)]
        strict = self._config.exit_on_error or self._config.fallback is FallbackPolicy.REFUSE
        if not failures or (len(failures) < len(names) and not strict):
            return False
        if self._config.model_control_mode is not ControlMode.NONE and not strict:
            return False
        self._stop.set()
        return True

    async def _poll(self, loaded: asyncio.Task[bool]) -> None:
        """With poll control, checks at intervals whether the repository has changed."""
        if self._config.model_control_mode is not ControlMode.POLL:
            return
        await loaded
        while True:
            await asyncio.sleep(self._config.repository_poll_secs)
            try:
                await self._repository.poll()
            except ZServeError as error:
                log.error("polling: %s", error)
            except Exception:
                # Nothing else would report it, and the next round may succeed: folders change while they are read.
                log.exception("polling failed; the next round is in %g s", self._config.repository_poll_secs)

    async def _follow_readiness(self) -> None:
        """Keeps the health status in line with the models until the server is told to stop."""
        announced = False
        while True:
            self._absent -= {model.spec.name for model in self._repository.loaded()}
            complete = self._started.is_set() and all(self._readiness().values())
            self._state.ready = complete or not self._config.strict_readiness
            self._health.set(serving=self._state.ready)
            if self._state.ready and not announced:
                announced = True
                log.info("ready: %s", ", ".join(model.spec.name for model in self._repository.loaded()))
            await self._changed.wait()
            self._changed.clear()

    def _readiness(self) -> dict[str, bool]:
        """For each model that is to be served, whether it is."""
        return {**dict.fromkeys(self._absent, False), **self._repository.readiness()}

    async def _shut_down(self, server: grpc.aio.Server) -> None:
        self._state.stopping, self._state.ready = True, False
        self._health.set(serving=False)
        models = self._repository.live
        log.info("shutting down: letting %d requests finish", sum(m.statistics.under_way for m in models))
        seconds = self._config.exit_timeout_secs
        self._dispatcher.refuse_new()
        if not all(await asyncio.gather(*(_idle(m, seconds) for m in models))):
            log.warning("not all requests finished within %g s", seconds)
            self._dispatcher.refuse_waiting()
        await self._repository.close()
        await server.stop(STOP_GRACE)
        await self._tracer.close()
        await self._memory.close()


def _tracer(config: ServeConfig, metrics: Metrics) -> Tracer:
    if config.trace.trace_mode is TraceMode.TRITON:
        return Tracer(config.trace, append_trace, lambda: None, metrics.traces_lost.inc)
    telemetry = Telemetry(config.telemetry, lost=metrics.traces_lost.inc)
    return Tracer(config.trace, telemetry.write, telemetry.close, metrics.traces_lost.inc)


async def _idle(model: Model, seconds: float) -> bool:
    """Waits until no request of the model is under way; False when `seconds` were not enough."""
    try:
        await asyncio.wait_for(model.statistics.idle(), seconds)
    except TimeoutError:
        return False
    return True


async def serve(config: ServeConfig) -> int:
    """Runs the frontend; returns the exit status."""
    keep_freed_memory(arenas=1)
    settle()
    with scratch_folder() as sockets:
        return await Frontend(config, sockets).run()


def _start_gauges(config: ServeConfig) -> Gauges:
    """Starts those that are allowed. If no process keeps the GPU driver loaded, opening it takes seconds."""
    sources: list[Source] = [CpuGauges()] if config.allow_cpu_metrics else []
    if config.allow_gpu_metrics:
        sources.append(GpuGauges(open_gpus()))
    gauges = Gauges(sources, config.metrics_interval_ms / 1e3)
    gauges.start()
    return gauges
