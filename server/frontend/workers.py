"""Worker processes: started, waited for, watched, replaced when they end or stop answering, stopped."""

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from export.spec import Component
from server.config import FallbackPolicy
from server.costs import CostTable
from server.errors import WorkerLostError
from server.launch import WorkerConfig, announced
from server.requests import Event, GenerationRequest, InstanceInfo
from server.rpc.images import ImageGenerationClient

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "server.worker.main")
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0  # seconds between restarts of a worker that keeps ending
KILL_AFTER = 5.0  # seconds from SIGTERM to SIGKILL
HEARTBEAT_EVERY = 1.0  # seconds
CHANNEL_GRACE = 1.0  # seconds for the calls of a worker that has ended to learn so
# How a process ends that runs bad machine code. SIGKILL is not among them: that is the system short of memory.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


class WorkerState(Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"  # ended before it was ever ready; not tried again
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(frozen=True)
class _Ending:
    """How a process ended."""

    status: int
    said: str
    was_ready: bool
    wedged: str = ""

    @property
    def crashed_engine(self) -> Component | None:
        """The component whose engine ended the process before it was ready."""
        crashed = -self.status in CRASHES and not self.was_ready
        return announced(self.said) if crashed else None

    def __str__(self) -> str:
        if self.wedged:
            return self.wedged
        if self.status < 0:
            return f"was ended by {signal.Signals(-self.status).name}"
        said = self.said.strip().rpartition("\n")[2]
        return said if said and announced(said) is None else f"exited with status {self.status}"


class Worker:
    """One worker process under supervision. `changed` is called whenever its state has changed."""

    def __init__(
        self, config: WorkerConfig, changed: Callable[["Worker"], None], command: Sequence[str] = COMMAND
    ) -> None:
        self.config = config
        self.state = WorkerState.STARTING
        self.reason = "loading and warming up"
        self.info: InstanceInfo | None = None
        self.costs = CostTable()
        self.restarts = 0
        self._changed = changed
        self._command = command
        self._client: ImageGenerationClient | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._wedged = ""

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Begins to run the process, for as long as the server does."""
        self._supervisor = asyncio.create_task(self._supervise(), name=f"supervise {self.config.instance}")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The worker's events for `request`; see `ImageGenerationClient.generate`."""
        if self._client is None:
            raise WorkerLostError(f"worker {self.config.instance} is {self.state.value}: {self.reason}")
        async with aclosing(self._client.generate(request)) as events:
            async for event in events:
                yield event

    def lose(self) -> None:
        """A call to it has broken off: it gets no more, even where the process's end is yet to be noticed."""
        if self.state is not WorkerState.READY:
            return
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._set(WorkerState.RESTARTING, "its connection broke off")

    async def stop(self) -> None:
        """Ends the process: SIGTERM, and SIGKILL if that does not help."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), KILL_AFTER)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        await self._close_client()
        self._set(WorkerState.STOPPED, "the server is shutting down")

    async def _supervise(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            ending = await self._run_once()
            if self._disable(ending):
                continue
            if self.info is None:
                log.error("worker %s cannot start: %s", self.config.instance, ending)
                self._set(WorkerState.FAILED, str(ending))
                return
            backoff = FIRST_BACKOFF if ending.was_ready else min(2 * backoff, LONGEST_BACKOFF)
            self.restarts += 1
            log.error("worker %s %s; starting another in %g s", self.config.instance, ending, backoff)
            self._set(WorkerState.RESTARTING, str(ending))
            await asyncio.sleep(backoff)

    def _disable(self, ending: _Ending) -> bool:
        """Turns off the engine that ended the process while it was loaded or warmed up; whether there was one."""
        component = ending.crashed_engine
        if component is None or component in self.config.disabled or self.config.fallback is FallbackPolicy.REFUSE:
            return False
        reason = f"its engine ended the worker process while it was loaded or warmed up: the process {ending}"
        log.error("worker %s: %s is off: %s", self.config.instance, component, reason)
        self.config = replace(self.config, disabled={**self.config.disabled, component: reason})
        self.restarts += 1
        return True

    async def _run_once(self) -> _Ending:
        """Runs one process to its end; returns how it ended."""
        self._remove_socket()
        self._wedged = ""
        # Its own session, so that Ctrl-C in a terminal reaches the frontend alone, which then lets requests finish.
        process = self._process = await asyncio.create_subprocess_exec(
            *self._command,
            *self.config.arguments(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        watch = asyncio.create_task(self._watch(process))
        try:
            said, _ = await process.communicate()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        was_ready = self._client is not None
        if was_ready:
            self._set(WorkerState.RESTARTING, "it has just ended")
        await self._close_client()
        return _Ending(process.returncode or 0, said.decode(errors="replace"), was_ready, self._wedged)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Waits until the worker serves; from then on listens for its heartbeat, and ends it when there is none."""
        client = ImageGenerationClient(f"unix:{self.config.socket}")
        try:
            self._see(await client.instance())
        except asyncio.CancelledError:
            await client.close()
            raise
        self._client = client
        self._set(WorkerState.READY, "")
        log.info("worker %s is ready on %s", self.config.instance, self.config.device)
        while not self._wedged:
            await asyncio.sleep(HEARTBEAT_EVERY)
            try:
                self._see(await client.instance(within=self.config.patience))
            except WorkerLostError as error:
                self._wedged = f"is given up: {error}"
        process.kill()

    def _see(self, info: InstanceInfo) -> None:
        self.info, self.costs = info, CostTable(info.step_costs)

    async def _close_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close(CHANNEL_GRACE)

    def _set(self, state: WorkerState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._changed(self)

    def _remove_socket(self) -> None:
        Path(self.config.socket).unlink(missing_ok=True)
