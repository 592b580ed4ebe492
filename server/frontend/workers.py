"""Worker processes: started, waited for, watched, replaced when they end or stop answering, stopped."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
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

# -P: modules are not looked up in the current directory.
COMMAND = (sys.executable, "-P", "-m", "server.worker.main")
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0  # seconds between restarts of a worker that keeps ending
KILL_AFTER = 5.0  # seconds from SIGTERM to SIGKILL, and from there until a process is left behind
HEARTBEAT_EVERY = 1.0  # seconds
LOOK_EVERY = 0.05  # seconds between two checks whether a process has ended
# Seconds for the rest of a worker's output once it has ended, and for its calls to fail; those still open then are
# cancelled.
CHANNEL_GRACE = 1.0
KEPT_BYTES = 16 * 1024  # of a worker's standard output, the end of which tells why the worker ended
# How a process that runs bad machine code ends. SIGKILL is not among them: it means the system is short of memory.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


class WorkerState(Enum):
    """Where a worker is in its life cycle."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"  # ended before it was ever ready; not tried again
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(frozen=True)
class _Ending:
    """How a process ended, or why there was none."""

    status: int = 0
    said: str = ""
    was_ready: bool = False
    known: str = ""  # how, if the status does not tell

    @property
    def crashed_engine(self) -> Component | None:
        """The component whose engine ended the process before it was ready."""
        crashed = -self.status in CRASHES and not self.was_ready
        return announced(self.said) if crashed else None

    def __str__(self) -> str:
        if self.known:
            return self.known
        if self.status < 0:
            named = -self.status in set(signal.Signals)  # real-time signals have no names of their own
            return f"was ended by {signal.Signals(-self.status).name if named else f'signal {-self.status}'}"
        said = self.said.strip().rpartition("\n")[2]
        return said if said and announced(said) is None else f"exited with status {self.status}"


@dataclass(eq=False)
class _Process:
    """One process of a worker, from its start to its end."""

    process: asyncio.subprocess.Process
    client: ImageGenerationClient
    said: asyncio.Task[bytes]  # the end of its standard output
    was_ready: bool = False
    given_up: str = ""  # why, if it did not end by itself

    async def ended(self) -> _Ending:
        """Waits for it to end, then kills what it has started.

        Its standard input stays open until then: if that closes, the worker assumes that the frontend is gone.
        `Process.communicate` would close it, since Python 3.12.
        """
        # Not `Process.wait`, nor the end of its output: both also wait for every child that has inherited its pipes.
        while (status := self.process.returncode) is None:  # noqa: ASYNC110 - asyncio has no event for it
            await asyncio.sleep(LOOK_EVERY)
        self._kill_all()
        await asyncio.wait((self.said,), timeout=CHANNEL_GRACE)  # takes that long only if a child has left the group
        said = self.said.result().decode(errors="replace") if self.said.done() else ""
        return _Ending(status, said, self.was_ready, self.given_up)

    def kill(self) -> None:
        """Ends it, if it has not ended yet."""
        if self.process.returncode is None:
            self._kill_all()

    async def stop(self) -> None:
        """Ends it and what it has started: SIGTERM, and SIGKILL if that does not help. If neither does, it is left."""
        for end in (self.process.terminate, self.kill):
            if self.process.returncode is None:
                end()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.ended(), KILL_AFTER)
                break
        else:
            log.error("process %d is left behind: it does not end, as where a driver does not return", self.process.pid)
        await self.client.close(CHANNEL_GRACE)

    def _kill_all(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # it leads a group of its own


async def _end_of(stream: asyncio.StreamReader) -> bytes:
    """The last bytes of `stream`. Everything is read: a process whose pipe is full would block."""
    kept = b""
    while read := await stream.read(KEPT_BYTES):
        kept = (kept + read)[-KEPT_BYTES:]
    return kept


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
        self._current: _Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process's ID, while there is one."""
        return None if self._current is None else self._current.process.pid

    def start(self) -> None:
        """Starts the process, and keeps one running for as long as the server runs."""
        self._supervisor = asyncio.create_task(self._supervise(), name=f"supervise {self.config.instance}")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The worker's events for `request`; see `ImageGenerationClient.generate`."""
        current = self._current
        if current is None or self.state is not WorkerState.READY:
            raise WorkerLostError(f"worker {self.config.instance} is {self.state.value}: {self.reason}")
        try:
            async with aclosing(current.client.generate(request)) as events:
                async for event in events:
                    yield event
        except WorkerLostError:
            self._lose(current)
            raise

    async def stop(self) -> None:
        """Ends the process, and the supervision of it."""
        self._set(WorkerState.STOPPED, "the server is shutting down")  # first: calls failing now are no loss
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._current is not None:
            await self._current.stop()

    def _lose(self, process: _Process) -> None:
        """A call to `process` has broken off: it gets no more calls, even if its end has yet to be noticed.

        A caller that notices late must not end the process that has replaced it since.
        """
        if process is not self._current or self.state is not WorkerState.READY:
            return
        process.kill()
        self._set(WorkerState.RESTARTING, "its connection broke off")

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
        """Turns off the engine that ended the process while being loaded or warmed up; says whether there was one."""
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
        try:
            current = self._current = await self._start_process()
        except (OSError, RuntimeError) as error:  # no memory, process or thread left, no interpreter: may pass
            return _Ending(known=f"could not be started: {error}")
        watch = asyncio.create_task(self._watch(current))
        try:
            ending = await current.ended()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        if current.was_ready:
            self._set(WorkerState.RESTARTING, "it has just ended")
        await current.client.close(CHANNEL_GRACE)
        self._current = None  # its PID may soon be reused by a process that `stop` must not end
        return ending

    async def _start_process(self) -> _Process:
        self._remove_socket()
        # Its own session, so that Ctrl-C in a terminal reaches the frontend alone, which then lets requests finish.
        process = await asyncio.create_subprocess_exec(
            *self._command,
            *self.config.arguments(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # What libraries unpack there, and a killed worker cannot remove, is removed with the frontend's own folder.
            env={**os.environ, "TMPDIR": str(self.config.socket.parent)},
            start_new_session=True,
        )
        assert process.stdout is not None, "it was started with a pipe"
        said = asyncio.create_task(_end_of(process.stdout), name=f"read what {self.config.instance} prints")
        return _Process(process, ImageGenerationClient(f"unix:{self.config.socket}"), said)

    async def _watch(self, process: _Process) -> None:
        """Waits until it serves, then polls for its heartbeat; kills it if there is none."""
        try:
            self._see(await process.client.instance(within=self.config.start_patience))
            process.was_ready = True
            self._set(WorkerState.READY, "")
            log.info("worker %s is ready on %s", self.config.instance, self.config.device)
            while True:
                await asyncio.sleep(HEARTBEAT_EVERY)
                self._see(await process.client.instance(within=self.config.patience))
        except WorkerLostError as error:
            process.given_up = f"is given up: {error}"
            process.kill()
            if self.state is WorkerState.READY:
                self._set(WorkerState.RESTARTING, process.given_up)
            # Where a driver does not return, SIGKILL does not end the process: its requests must not wait for that.
            await process.client.close(CHANNEL_GRACE)

    def _see(self, info: InstanceInfo) -> None:
        self.info, self.costs = info, CostTable(info.step_costs)

    def _set(self, state: WorkerState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._changed(self)

    def _remove_socket(self) -> None:
        Path(self.config.socket).unlink(missing_ok=True)
