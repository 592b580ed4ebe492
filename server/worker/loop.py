"""The worker's loop: plan -> run -> report. The only thread that touches the device.

At most two steps are in progress: the one that runs, and the next, which is planned and given to the device when the
first is nearly done (`AHEAD`), so that the device does not wait for the host between them. Encoding and decoding are
started when they are planned, beside the steps where the device can do that, and collected when they are done.

Requests and cancellations come in through a queue, events go out through callbacks; while a step runs the loop takes in
whatever arrives, so a cancel or a more urgent request takes effect at the next step. A step's events are delivered once
the next step has been given to the device: the event loop that receives them takes the interpreter's lock, and the
device would wait.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from server.errors import DeadlinePassedError
from server.requests import Progress
from server.worker.events import FinishedImage, Listener, SequenceStarted
from server.worker.executor import Executor
from server.worker.failures import Failures
from server.worker.images import Pixels
from server.worker.lanes import Pending
from server.worker.planner import Plan, Planner, Stage, Wait
from server.worker.previews import Previews
from server.worker.reports import Reports
from server.worker.sequences import ImageSequence
from server.worker.under_way import SideTask, Step, images_of
from server.worker.watchdog import Running, Watchdog

T = TypeVar("T")

# Seconds before a step's expected end at which the next one is planned. Planning it and giving it to the device takes 1
# to 2 ms, sometimes more when other threads of this process are busy.
AHEAD = 0.005
# Seconds between two polls of what runs beside the steps: while no step runs, and while one does (longer, because each
# poll takes the interpreter's lock for a moment).
LOOK_EVERY, LOOK_BESIDE = 0.0003, 0.002


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


class WorkerLoop(threading.Thread):
    """Runs sequences until it is stopped. `patience`: seconds that any plan may take, whatever it should cost."""

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
        self._watchdog = Watchdog(clock, patience)
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Call | None] = queue.SimpleQueue()
        self._side_tasks: list[SideTask] = []
        self._step: Step | None = None
        self._reports = Reports()
        self._previews = Previews(executor, self._reports)
        self._failures = Failures(executor, planner, self._reports, clock)
        self._running = True

    def submit(self, sequences: tuple[ImageSequence, ...], listener: Listener) -> None:
        """Takes in all sequences of one request; `listener` is called on the loop's thread with its events."""
        self._inbox.put(_Submit(sequences, listener))

    def cancel(self, key: int) -> None:
        """Takes the request's sequences out at the next step; an unknown key is ignored."""
        self._inbox.put(_Cancel(key))

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """Runs `work` on the loop's thread between two plans: CUDA's libraries keep what they prepare per thread."""
        answer: Future[T] = Future()
        self._inbox.put(_Call(work, answer))
        return answer

    def stop(self) -> None:
        """Ends the loop after the step that is running."""
        self._inbox.put(None)

    @property
    def alive(self) -> bool:
        """False when the device has not come back from a plan long after it should have, or the thread has ended."""
        return self.is_alive() and not self._watchdog.hung

    def run(self) -> None:
        """The thread's body."""
        while self._running and not self._failures.device_lost:
            self._take_in()
            self._collect()
            self._drop_hopeless()
            self._tell_positions()
            self._go_on(self._planner.plan(self._clock()))
        self._settle()
        self._reports.tell()

    def _go_on(self, plan: Plan | Wait | None) -> None:
        """Carries out the planner's decision as soon as it is due."""
        if self._step is None or (isinstance(plan, Plan) and plan.stage is not Stage.DENOISE):
            match plan:
                case Plan():
                    self._run(plan)
                case Wait(until):
                    self._receive(self._at_most(until - self._clock()))
        elif (early := self._nearly_done(self._step) - self._clock()) > 0:
            self._receive(self._at_most(early))  # what arrives until then may change the plan
        elif isinstance(plan, Plan):
            self._run(plan)
        else:
            self._settle()

    def _nearly_done(self, step: Step) -> float:
        """When the step after `step` has to be planned."""
        return step.began + self._planner.expected_seconds(step.plan) - AHEAD

    def _take_in(self) -> None:
        """Handles everything that has arrived; waits when there is nothing else to do."""
        if len(self._planner) == 0 and self._step is None:
            self._receive(self._at_most(None))
        while not self._inbox.empty():
            self._receive(None)

    def _at_most(self, seconds: float | None) -> float | None:
        """How long to wait for messages: only briefly while the device works, since it sends none when it is done."""
        if self._step is None and not self._side_tasks:
            return seconds
        # A step may end sooner than its cost says; if that went unnoticed, the waiting time would become its cost.
        look = LOOK_EVERY if self._step is None else LOOK_BESIDE if self._side_tasks else AHEAD
        return look if seconds is None else min(seconds, look)

    def _receive(self, seconds: float | None) -> None:
        """Handles the next message, if it comes within `seconds`; None waits for ever."""
        self._reports.tell()
        try:
            message = self._inbox.get(timeout=seconds if seconds is None else max(0.0, seconds))
        except queue.Empty:
            return
        match message:
            case _Submit(sequences, listener):
                self._reports.follow(sequences[0].key, listener)
                for sequence in sequences:
                    self._planner.add(sequence, self._clock())
            case _Cancel(key):
                self._reports.forget(key)
                self._planner.remove(key, self._clock())
            case _Call(work, answer):
                try:
                    answer.set_result(work())
                except Exception as error:  # noqa: BLE001 - it belongs to the caller, who waits for it
                    answer.set_exception(error)
            case None:
                self._executor.keep_kernels()
                self._running = False

    def _drop_hopeless(self) -> None:
        free = 0.0 if self._step is None else self._nearly_done(self._step) + AHEAD
        # One at a time: all images of its request go with it, and sequences behind them may then be in time.
        while hopeless := self._planner.hopeless(self._clock(), free):
            sequence = hopeless[0]
            behind = "" if sequence.started else " behind what goes before it"
            self._failures.fail(
                sequence.key,
                DeadlinePassedError(
                    f"the deadline cannot be met: {sequence.left} of {sequence.steps} steps were still to do{behind}; "
                    "allow more time, or ask for fewer steps or a smaller size"
                ),
            )

    def _tell_positions(self) -> None:
        """Reports queue positions to requests that have not begun, whenever these may have changed."""
        if self._reports.positions_changed:
            now = self._clock()
            self._reports.note_positions(self._planner.forecast(now), now)

    def _run(self, plan: Plan) -> None:
        """Gives a plan to the device; a step goes behind the running one, which is then waited for."""
        began = self._clock()
        self._watchdog.watch(self._running_since(began, plan))
        with self._failing_only(plan):
            if plan.stage is Stage.DENOISE:
                self._denoise(plan, began)
            else:
                self._start(plan, began)
        self._watch()

    @contextmanager
    def _failing_only(self, plan: Plan) -> Iterator[None]:
        """Attributes errors in this block to the plan's own requests only; the loop goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the boundary between one request and the others
            self._wait_for_all()
            self._watchdog.watch(self._running_since(self._clock(), plan))  # checking the device may hang
            for alone in self._failures.handle(plan, error):
                if self._reports.follows(alone.sequences[0].key) and not self._failures.device_lost:
                    self._run(alone)

    def _wait_for_all(self) -> None:
        """Waits until nothing runs on the device."""
        self._settle()
        while self._side_tasks:
            time.sleep(LOOK_EVERY)
            self._collect()

    def _denoise(self, plan: Plan, began: float) -> None:
        sequences = images_of(plan)
        if self._step is None:  # on a device without streams the call below runs the step, and events would wait for it
            self._reports.tell()
        pending = self._executor.denoise(sequences)
        # At once: the latents will have moved, so whatever fails from here on, the step must not be run again.
        self._planner.advance(plan)
        for sequence in sequences:
            if not sequence.left:  # it is decoded when this step is done
                self._planner.set_aside(sequence)
        self._mark_shared()
        taken = [(s, s.step, self._previews.begin(s)) for s in sequences]
        if self._step is not None:
            self._settle()
            began = self._clock()
        self._step = Step(plan, pending, taken, began, alone=not self._side_tasks)
        if self._is_over(pending):
            self._settle()

    @staticmethod
    def _is_over(pending: Pending[Any]) -> bool:
        """Whether the result can be had without waiting: it is done, or the device is lost, which `result` reports."""
        try:
            return pending.done()
        except RuntimeError:
            return True

    def _settle(self) -> None:
        """Waits for the running step, and reports what it has done."""
        if self._step is None:
            return
        step, self._step = self._step, None
        try:
            seconds = step.pending.result()
        except Exception as error:  # noqa: BLE001 - the boundary between one request and the others
            self._failures.give_up(step.plan, error)
            self._watch()
            return
        ended = self._clock()
        if step.alone:  # one that shares the device costs more
            self._planner.observe(step.plan, seconds)
        for row, (sequence, number, preview) in enumerate(step.taken):
            if number == sequence.steps:
                self._planner.take_back(sequence, ended)
            self._report_step(sequence, number, 1e3 * seconds, len(step.taken), row)
            if preview is not None:
                self._previews.report(sequence, number, preview)
        self._watch()
        self._reports.tell()

    def _start(self, plan: Plan, began: float) -> None:
        """Gives the device an encode or decode; sets its sequence aside if that is not done at once."""
        (sequence,) = images_of(plan)
        pending: Pending[Pixels] | Pending[None]
        if plan.stage is Stage.DECODE:
            pending = self._executor.decode(sequence)
        else:
            self._reports.note(sequence.key, SequenceStarted(began))
            if self._step is None:  # otherwise, if encoding hung, nobody would know that it was this request
                self._reports.tell()
            pending = self._executor.encode(sequence)
        task = SideTask(plan, sequence, pending, began, alone=self._step is None and not self._side_tasks)
        self._mark_shared()
        if pending.done():
            self._finish(task)
            self._observe(task)
        else:
            self._planner.set_aside(sequence)
            self._side_tasks.append(task)
            if self._step is not None:
                self._step.alone = False
        self._reports.tell()

    def _collect(self) -> None:
        """Collects what is done: a step that ended early, and work beside it, whose request may be gone."""
        if self._step is not None and self._is_over(self._step.pending):
            self._settle()
        while (task := next((t for t in self._side_tasks if self._is_over(t.pending)), None)) is not None:
            self._side_tasks.remove(task)
            self._observe(task)
            if self._planner.take_back(task.sequence, self._clock()):
                with self._failing_only(task.plan):
                    self._finish(task)
        self._watch()

    def _mark_shared(self) -> None:
        """Notes that the side tasks no longer have the device to themselves."""
        for task in self._side_tasks:
            task.alone = False

    def _observe(self, task: SideTask) -> None:
        """Records what a side task has cost, for encoding per prompt; cached prompts have cost nothing."""
        parts = task.sequence.encoded if task.plan.stage is Stage.ENCODE else 1
        if parts:
            observe = self._planner.observe if task.alone else self._planner.observe_beside
            observe(task.plan, (self._clock() - task.began) / parts)

    def _finish(self, task: SideTask) -> None:
        result = task.pending.result()
        if result is not None:
            self._reports.note(task.sequence.key, FinishedImage(task.sequence, result))
        self._planner.advance(task.plan)
        self._reports.positions_changed = True

    def _running_since(self, began: float, plan: Plan) -> Running:
        return Running(began, self._planner.expected_seconds(plan))

    def _watch(self) -> None:
        """Tells the watchdog what the device has been given: only that can hang."""
        running = [self._running_since(task.began, task.plan) for task in self._side_tasks]
        if self._step is not None:
            running.append(self._running_since(self._step.began, self._step.plan))
        self._watchdog.watch_only(running)

    def _report_step(self, sequence: ImageSequence, done: int, step_ms: float, batch_size: int, row: int) -> None:
        event = Progress(done, sequence.steps, sequence.image_index, step_ms, batch_size, row)
        self._reports.note(sequence.key, event)
