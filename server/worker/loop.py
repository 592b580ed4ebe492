"""The worker's loop: plan -> run -> report. The only thread that touches the device.

A step is waited for. What is not a step, encoding and decoding, is only begun where the device can do it beside steps;
it is collected between two of them, when it is done.

Requests and cancellations come in through a queue, events go out through callbacks; between two plans the loop takes
in whatever has arrived, so a cancel or a more urgent request takes effect at the next step. What there is to tell of a
step is told when the next one has been given to the device: the event loop that hears of it takes the interpreter's
lock, and the device would wait.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from export.spec import Component
from server.engines.memory import out_of_memory_error
from server.errors import DeadlinePassedError, NonFiniteError
from server.requests import Progress, Queued
from server.worker.events import Failed, FinishedImage, Listener, LoopEvent, PreviewPixels, SequenceStarted
from server.worker.executor import Executor, ImageSequence
from server.worker.images import Pixels
from server.worker.lanes import Pending
from server.worker.planner import Plan, Planner, Stage, Wait

T = TypeVar("T")

log = logging.getLogger(__name__)

LOOK_EVERY = 0.001  # seconds between two looks at what runs beside the steps, when there is no step to take
LATE = 20.0  # a plan that takes so many times what it should, and the loop's patience besides, never ends


@dataclass(frozen=True)
class _Submit:
    sequences: tuple[ImageSequence, ...]
    listener: Listener


@dataclass(frozen=True)
class _Cancel:
    key: int


@dataclass(frozen=True)
class _Call:
    work: Callable[[], object]
    answer: "Future[Any]"


@dataclass(frozen=True, eq=False)
class _Flight:
    """A plan that runs beside the steps, for its one sequence."""

    plan: Plan
    sequence: ImageSequence
    pending: Pending[Pixels] | Pending[None]
    began: float


class WorkerLoop(threading.Thread):
    """Runs sequences until it is stopped. `patience`: seconds that anything may take, whatever it should."""

    def __init__(
        self,
        executor: Executor,
        planner: Planner,
        *,
        clock: Callable[[], float] = time.monotonic,
        patience: float = 60.0,
    ) -> None:
        super().__init__(name="device", daemon=True)
        self._executor = executor
        self._planner = planner
        self._clock = clock
        self._patience = patience
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Call | None] = queue.SimpleQueue()
        self._flights: list[_Flight] = []
        self._listeners: dict[int, Listener] = {}
        self._told: dict[int, int] = {}  # by key, the queue position that was reported last
        self._untold: list[tuple[Listener, LoopEvent]] = []
        self._moved = False  # whether positions in the queue may have changed
        self._overdue_at = float("inf")  # when the plan that runs now should long have ended
        self._running = True

    def submit(self, sequences: tuple[ImageSequence, ...], listener: Listener) -> None:
        """Takes in all sequences of one request; `listener` is called on this thread with what happens."""
        self._inbox.put(_Submit(sequences, listener))

    def cancel(self, key: int) -> None:
        """Takes the request's sequences out at the next step; unknown ones are ignored."""
        self._inbox.put(_Cancel(key))

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """Runs `work` on this thread, between two plans. What CUDA's libraries prepare is kept by thread."""
        answer: Future[T] = Future()
        self._inbox.put(_Call(work, answer))
        return answer

    def stop(self) -> None:
        """Ends the loop after the step that is running."""
        self._inbox.put(None)

    @property
    def alive(self) -> bool:
        """False when the device has not come back from a plan long after it should have, or the thread has ended."""
        return self.is_alive() and self._clock() < self._overdue_at

    def run(self) -> None:
        """The thread's body."""
        while self._running:
            self._take_in()
            self._collect()
            self._drop_hopeless()
            self._tell_positions()
            match self._planner.plan(self._clock()):
                case Plan() as plan:
                    self._run(plan)
                case Wait(until):
                    self._receive(self._at_most(until - self._clock()))
        self._tell()

    def _take_in(self) -> None:
        """Everything that has arrived; waits when there is nothing else to do."""
        if len(self._planner) == 0:
            self._receive(self._at_most(None))
        while not self._inbox.empty():
            self._receive(None)

    def _at_most(self, seconds: float | None) -> float | None:
        """So long it may wait for messages: not long while something runs that does not send one."""
        return seconds if not self._flights else LOOK_EVERY if seconds is None else min(seconds, LOOK_EVERY)

    def _receive(self, seconds: float | None) -> None:
        """Handles the next message, if it comes within `seconds`; None waits for ever."""
        self._tell()
        try:
            message = self._inbox.get(timeout=seconds if seconds is None else max(0.0, seconds))
        except queue.Empty:
            return
        match message:
            case _Submit(sequences, listener):
                self._moved = True
                self._listeners[sequences[0].key] = listener
                for sequence in sequences:
                    self._planner.add(sequence, self._clock())
            case _Cancel(key):
                self._forget(key)
            case _Call(work, answer):
                try:
                    answer.set_result(work())
                except Exception as error:  # noqa: BLE001 - it is the caller's, who waits for it
                    answer.set_exception(error)
            case None:
                self._running = False

    def _drop_hopeless(self) -> None:
        for sequence in self._planner.hopeless(self._clock()):
            self._fail(
                sequence.key,
                DeadlinePassedError(
                    f"the deadline cannot be met: {sequence.left} of {sequence.steps} steps were still to do; allow "
                    "more time, or ask for fewer steps or a smaller size"
                ),
            )

    def _tell_positions(self) -> None:
        """Tells those that have not begun where they stand, whenever that has changed."""
        if not self._moved:
            return
        self._moved = False
        now = self._clock()
        forecasts = self._planner.forecast(now)
        for key, forecast in forecasts.items():
            if self._told.get(key) != forecast.position:
                self._notify(key, Queued(forecast.position, 1e3 * (forecast.starts - now)))
        self._told = {key: forecast.position for key, forecast in forecasts.items()}

    def _run(self, plan: Plan) -> None:
        """One plan, or the beginning of one that runs beside others."""
        began = self._clock()
        self._overdue_at = self._overdue(plan, began)
        with self._blamed(plan):
            if plan.stage is Stage.DENOISE:
                self._denoise(plan, began)
            else:
                self._start(plan, began)
        self._note_overdue()

    @contextmanager
    def _blamed(self, plan: Plan) -> Iterator[None]:
        """What goes wrong in this block is the fault of the plan's own requests only, and the loop goes on."""
        try:
            yield
        except NonFiniteError as error:
            self._start_again(_images(plan), error)
        except torch.OutOfMemoryError as error:
            self._retry_smaller(_images(plan), error)
        except Exception as error:  # noqa: BLE001 - the boundary between one request and the others
            self._find_the_culprit(plan, error)

    def _denoise(self, plan: Plan, began: float) -> None:
        sequences = _images(plan)
        self._executor.denoise(sequences, self._tell)
        seconds = self._clock() - began
        # At once: the latents have moved, and whatever fails from here on, no step is run again.
        self._planner.advance(plan)
        if not self._flights:  # a step that shares the device costs more
            self._planner.observe(plan, seconds)
        for row, sequence in enumerate(sequences):
            self._report_step(sequence, 1e3 * seconds, len(sequences), row)

    def _start(self, plan: Plan, began: float) -> None:
        """Gives the device what is not a step, and goes on with others if that is not done at once."""
        (sequence,) = _images(plan)
        pending: Pending[Pixels] | Pending[None]
        if plan.stage is Stage.DECODE:
            pending = self._executor.decode(sequence)
        else:
            self._notify(sequence.key, SequenceStarted(began))
            pending = self._executor.encode(sequence)
        flight = _Flight(plan, sequence, pending, began)
        if pending.done():
            self._land(flight)
            self._planner.observe(plan, self._clock() - began)
        else:
            self._planner.set_aside(sequence)
            self._flights.append(flight)
        self._tell()

    def _collect(self) -> None:
        """What runs beside the steps and is done; nobody may want it any more."""
        while (flight := next((f for f in self._flights if f.pending.done()), None)) is not None:
            self._flights.remove(flight)
            if self._planner.take_back(flight.sequence, self._clock()):
                with self._blamed(flight.plan):
                    self._land(flight)
        self._note_overdue()

    def _land(self, flight: "_Flight") -> None:
        result = flight.pending.result()
        if result is not None:
            self._notify(flight.sequence.key, FinishedImage(flight.sequence, result))
        self._planner.advance(flight.plan)
        self._moved = True

    def _overdue(self, plan: Plan, began: float) -> float:
        return began + self._patience + LATE * self._planner.expected_seconds(plan)

    def _note_overdue(self) -> None:
        """Between two plans, only what runs beside them can fail to come back."""
        self._overdue_at = min((self._overdue(f.plan, f.began) for f in self._flights), default=float("inf"))

    def _report_step(self, sequence: ImageSequence, step_ms: float, batch_size: int, row: int) -> None:
        done, interval = sequence.step, sequence.request.preview_interval
        self._notify(sequence.key, Progress(done, sequence.steps, sequence.image_index, step_ms, batch_size, row))
        if interval and done % interval == 0 and done < sequence.steps:
            self._send_preview(sequence, done)

    def _send_preview(self, sequence: ImageSequence, done: int) -> None:
        """A preview that cannot be made is left out: it is nothing that an image would have to fail for."""
        try:
            pixels = self._executor.preview(sequence, done)
        except Exception as error:  # noqa: BLE001 - the boundary between a preview and the images
            log.warning("no preview of request %s after step %d: %s", sequence.request.request_id, done, error)
            return
        self._notify(sequence.key, PreviewPixels(done, sequence.image_index, pixels))

    def _start_again(self, sequences: list[ImageSequence], error: NonFiniteError) -> None:
        """On eager, from the noise; whatever was not finite there too is beyond help."""
        self._executor.quarantine(Component.DENOISER, str(error))
        for sequence in sequences:
            if sequence.restarted:
                self._fail(sequence.key, error)
                continue
            sequence.restarted = True
            self._executor.reset(sequence)
            self._planner.restart([sequence])

    def _retry_smaller(self, sequences: list[ImageSequence], error: torch.OutOfMemoryError) -> None:
        """Frees what can be freed and halves the batch; a sequence that does not fit alone is tried once more."""
        refusal = out_of_memory_error(error)
        log.warning("out of memory with %d of %s: %s", len(sequences), sequences[0].shape, refusal)
        self._wait_for_flights()
        self._executor.free_memory()
        self._planner.limit_batch(sequences[0].shape, len(sequences) // 2)
        if len(sequences) > 1:
            return
        if sequences[0].starved:
            self._fail(sequences[0].key, refusal)
        sequences[0].starved = True

    def _wait_for_flights(self) -> None:
        """Until nothing runs beside the steps."""
        while self._flights:
            time.sleep(LOOK_EVERY)
            self._collect()

    def _find_the_culprit(self, plan: Plan, error: Exception) -> None:
        """Of a batch each is run alone: nobody fails for their company. Unless it was the device."""
        if not self._executor.usable():
            log.critical("the device cannot be used any more, so this worker ends: %s", error)
            self._running = False  # its requests are started over by whoever notices that it is not alive
            return
        if len(plan.sequences) == 1:
            self._fail(plan.sequences[0].key, error)
            return
        for sequence in plan.sequences:
            self._run(Plan(plan.stage, (sequence,)))

    def _notify(self, key: int, event: LoopEvent) -> None:
        listener = self._listeners.get(key)
        if listener is not None:
            self._untold.append((listener, event))

    def _tell(self) -> None:
        """Tells the listeners what has happened, in order."""
        untold, self._untold = self._untold, []
        for listener, event in untold:
            listener(event)

    def _fail(self, key: int, error: Exception) -> None:
        """Answers the request once, and takes all its sequences out."""
        self._notify(key, Failed(error))
        self._forget(key)

    def _forget(self, key: int) -> None:
        self._moved = True
        self._planner.remove(key, self._clock())
        self._listeners.pop(key, None)


def _images(plan: Plan) -> list[ImageSequence]:
    return [s for s in plan.sequences if isinstance(s, ImageSequence)]
