"""The worker's loop: every request is answered, and one request's fault is no other's."""

import dataclasses
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from server.costs import CostTable
from server.errors import DeadlinePassedError, DeviceMemoryError, NonFiniteError
from server.requests import Progress, Queued, StepCost
from server.worker.batching import BatchPolicy
from server.worker.events import Failed, FinishedImage, LoopEvent, PreviewPixels, SequenceStarted
from server.worker.executor import Executor
from server.worker.images import Pixels
from server.worker.lanes import Pending
from server.worker.loop import WorkerLoop
from server.worker.planner import Planner
from server.worker.sequences import ImageSequence, make_sequences
from server.worker.watchdog import Running, Watchdog
from tests.fakes import FakeClock, a_request

PATIENCE = 100.0  # seconds for what has to come about


class FakeMark:
    """A point that the device passes when it is told to."""

    def __init__(self) -> None:
        self.passed = threading.Event()
        self.looks = 0

    def query(self) -> bool:
        self.looks += 1
        return self.passed.is_set()

    def synchronize(self) -> None:
        self.passed.wait(PATIENCE)


class ScriptedExecutor(Executor):
    """Does nothing, unless a request's prompt says what is to go wrong."""

    def __init__(self) -> None:
        self.faults: dict[str, Exception] = {}
        self.encoded = 1  # prompts at each request
        self.quarantines = 0
        self.freed = self.kept = 0
        self.largest = 100  # batch that there is memory for
        self.batches: list[int] = []
        self.steps_taken: Counter[str] = Counter()  # by prompt
        self.gate, self.at_gate = threading.Event(), threading.Event()
        self.gate.set()
        self.lost = False  # whether the device is
        self.resets = 0
        self.asynchronous = False  # whether steps are done when they are told to, by their marks in `steps`
        self.steps: list[FakeMark] = []
        self.marks: dict[tuple[str, str], list[FakeMark]] = {}  # of stages, by prompt, that run beside the steps

    def encode(self, sequence: ImageSequence) -> Pending[None]:
        sequence.encoded = self.encoded
        return Pending(lambda: None, *self.marks.get(("encode", sequence.request.prompt), ()))

    def denoise(self, sequences: list[ImageSequence]) -> Pending[float]:  # type: ignore[override]
        self.at_gate.set()
        self.gate.wait(PATIENCE)
        self.batches.append(len(sequences))
        if len(sequences) > self.largest:
            raise torch.OutOfMemoryError("together")
        for sequence in sequences:
            if fault := self.faults.get(sequence.request.prompt):
                raise fault
        self.steps_taken.update(s.request.prompt for s in sequences)
        marks = [FakeMark()] if self.asynchronous else []
        self.steps += marks
        return Pending(lambda: 1.0, *marks)

    def decode(self, sequence: ImageSequence) -> Pending[Pixels]:
        prompt = sequence.request.prompt

        def finish() -> Pixels:
            if prompt == "never finite" or (prompt == "overflow" and not self.resets):
                raise NonFiniteError("inf")
            return torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()

        return Pending(finish, *self.marks.get(("decode", prompt), ()))

    def preview(self, sequence: ImageSequence, step: int) -> Pending[Pixels]:
        def finish() -> Pixels:
            if sequence.request.prompt == "spoilt preview":
                raise RuntimeError("a preview")
            return torch.zeros(1, 1, 3, dtype=torch.uint8).numpy()

        if sequence.request.prompt == "no preview":
            raise torch.OutOfMemoryError("a preview")
        return Pending(finish)

    def quarantine(self, component: object, reason: str) -> None:
        self.quarantines += 1

    def reset(self, sequence: ImageSequence) -> None:
        self.resets += 1

    def free_memory(self) -> None:
        self.freed += 1

    def keep_kernels(self) -> None:
        self.kept += 1

    def let_go(self) -> None:
        """Nothing is waited for any more."""
        self.asynchronous = False
        self.gate.set()
        for mark in (*self.steps, *(mark for marks in self.marks.values() for mark in marks)):
            mark.passed.set()

    def usable(self) -> bool:
        return not self.lost


class Harness:
    """A running loop, and the events of each request."""

    def __init__(self, executor: ScriptedExecutor | None = None) -> None:
        self.executor, self.clock = executor or ScriptedExecutor(), FakeClock()
        costs = CostTable([StepCost(64, 64, rows, 1.0 + 0.1 * rows) for rows in (1, 2, 4)])
        self.loop = WorkerLoop(self.executor, Planner(costs, BatchPolicy(4)), clock=self.clock, patience=10.0)
        self.keys = iter(range(100))

    def submit(self, prompt: str = "fine", **changes: object) -> "queue.SimpleQueue[LoopEvent]":
        events: queue.SimpleQueue[LoopEvent] = queue.SimpleQueue()
        request = dataclasses.replace(a_request(), prompt=prompt, **changes)  # type: ignore[arg-type]
        self.loop.submit(make_sequences(request, ((1, 2),), key=next(self.keys), shift=3.0, now=0.0), events.put)
        return events


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness()
    yield made
    made.executor.let_go()
    made.loop.stop()
    if made.loop.is_alive():
        made.loop.join(PATIENCE)
    assert not made.loop.is_alive()


def until_the_end(events: "queue.SimpleQueue[LoopEvent]", images: int = 1) -> list[LoopEvent]:
    seen: list[LoopEvent] = []
    while sum(isinstance(e, FinishedImage) for e in seen) < images:
        seen.append(events.get(timeout=PATIENCE))
        if isinstance(seen[-1], Failed):
            break
    return seen


def test_a_request_is_reported_from_start_to_image(harness: Harness) -> None:
    harness.loop.start()
    events = until_the_end(harness.submit(num_inference_steps=3, preview_interval=2))
    kinds = [type(e) for e in events]
    assert kinds == [Queued, SequenceStarted, Progress, Progress, PreviewPixels, Progress, FinishedImage]
    assert [e.step for e in events if isinstance(e, Progress)] == [1, 2, 3]
    assert harness.executor.kept == 0
    harness.loop.stop()
    harness.loop.join(PATIENCE)
    assert not harness.loop.is_alive()
    assert harness.executor.kept == 1, "for the next start"


def test_of_all_that_the_device_has_been_given_the_first_that_is_late_shows_that_it_hangs() -> None:
    clock = FakeClock()
    watchdog = Watchdog(clock, patience=1.0)
    watchdog.watch(Running(0.0, expected=0.1))
    watchdog.watch(Running(0.5, expected=10.0))
    clock.now = 2.9
    assert not watchdog.hung
    clock.now = 3.0
    assert watchdog.hung


class Steps:
    """The steps of a loop whose device takes its time, looked at from outside."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        harness.executor.asynchronous = True
        harness.loop.start()

    def nearly_done(self) -> None:
        """The time has come at which the step that runs should be done."""
        self.harness.clock.now += 1.2
        self.harness.loop.cancel(99)  # of nobody: the loop's own clock is not this one

    def done(self, number: int) -> None:
        """The device is done with a step, counted from 1."""
        self.harness.executor.steps[number - 1].passed.set()

    def given(self, count: int) -> None:
        """Waits until the device has been given so many."""
        until(lambda: len(self.harness.executor.steps) >= count)
        assert len(self.harness.executor.steps) == count


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < end:
        time.sleep(0.001)
    assert true()


def test_the_device_has_its_next_step_before_it_is_done_with_one(harness: Harness) -> None:
    steps, events = Steps(harness), harness.submit(num_inference_steps=3)
    steps.given(1)
    harness.loop.call(lambda: None).result(PATIENCE)
    steps.given(1)
    steps.nearly_done()
    steps.given(2)
    assert not [e for e in drain(events) if isinstance(e, Progress)], "the first is not done"
    steps.done(1)
    assert events.get(timeout=PATIENCE) == Progress(1, 3, 0, 1000.0, 1, 0)
    assert not harness.executor.steps[1].passed.is_set(), "it was told while the second one ran"
    steps.nearly_done()
    steps.given(3)
    steps.done(2), steps.done(3)
    steps.nearly_done()
    assert isinstance(until_the_end(events)[-1], FinishedImage)


def test_a_step_that_had_to_wait_for_the_one_before_is_as_long_as_any(harness: Harness) -> None:
    """Its own time begins when the device does with it, and the one after it is not decided too early."""
    steps, events = Steps(harness), harness.submit(num_inference_steps=3)
    steps.given(1)
    steps.nearly_done()
    steps.given(2)
    drain(events)
    harness.clock.now = 2.0
    steps.done(1)
    assert isinstance(events.get(timeout=PATIENCE), Progress)
    harness.clock.now = 2.5  # 1.3 seconds after it was given, half a second after it began
    for _ in range(2):
        harness.loop.call(lambda: None).result(PATIENCE)
    steps.given(2)
    harness.clock.now = 3.2
    steps.given(3)
    steps.done(2), steps.done(3)
    assert isinstance(until_the_end(events)[-1], FinishedImage)


def test_what_arrives_while_a_step_runs_is_in_time_for_the_next(harness: Harness) -> None:
    steps, late = Steps(harness), harness.submit("low", num_inference_steps=4, priority=4)
    steps.given(1)
    urgent = harness.submit("high", num_inference_steps=1, priority=1)
    steps.nearly_done()
    steps.given(2)
    assert harness.executor.steps_taken == {"low": 1, "high": 1}
    steps.done(1), steps.done(2)
    steps.nearly_done()
    assert isinstance(until_the_end(urgent)[-1], FinishedImage)
    harness.loop.cancel(0)
    harness.loop.call(lambda: None).result(PATIENCE)
    for mark in harness.executor.steps:
        mark.passed.set()
    harness.executor.asynchronous = False
    assert isinstance(until_the_end(harness.submit())[-1], FinishedImage)
    assert not [e for e in drain(late) if isinstance(e, FinishedImage | Failed)]


def test_a_request_that_is_cancelled_while_its_step_runs_takes_no_other(harness: Harness) -> None:
    steps, unwanted = Steps(harness), harness.submit("unwanted", num_inference_steps=4)
    steps.given(1)
    harness.loop.cancel(0)
    other = harness.submit("other", num_inference_steps=1)
    steps.nearly_done()
    steps.given(2)
    steps.done(1), steps.done(2)
    steps.nearly_done()
    assert isinstance(until_the_end(other)[-1], FinishedImage)
    assert harness.executor.steps_taken == {"unwanted": 1, "other": 1}
    assert not [e for e in drain(unwanted) if isinstance(e, Progress | FinishedImage | Failed)]


def test_an_image_is_decoded_when_its_last_step_is_done(harness: Harness) -> None:
    mark = beside(harness, "decode", "first")
    steps, first = Steps(harness), harness.submit("first", num_inference_steps=1)
    second = harness.submit("second", num_inference_steps=2, width=128)
    steps.given(1)
    steps.nearly_done()
    steps.given(2)
    assert not mark.looks, "not before the device is done with what it decodes"
    steps.done(1)
    until_begun(mark)
    mark.passed.set()
    assert isinstance(until_the_end(first)[-1], FinishedImage)
    steps.done(2)
    steps.nearly_done()
    steps.given(3)
    steps.done(3)
    steps.nearly_done()
    assert isinstance(until_the_end(second)[-1], FinishedImage)


@pytest.mark.parametrize("fault", [ValueError("boom"), torch.OutOfMemoryError("tried to allocate 9 GiB")])
def test_a_step_that_cannot_be_begun_leaves_the_one_that_runs_alone(harness: Harness, fault: Exception) -> None:
    steps, good = Steps(harness), harness.submit("good", num_inference_steps=2, priority=4)
    steps.given(1)
    harness.executor.faults = {"bad": fault}
    bad = harness.submit("bad", priority=1)
    assert isinstance(bad.get(timeout=PATIENCE), Queued)  # it is there before the next step is planned
    steps.done(1)
    steps.nearly_done()
    assert isinstance(until_the_end(bad)[-1], Failed)
    steps.given(2)
    steps.done(2)
    steps.nearly_done()
    seen = until_the_end(good)
    assert [e.step for e in seen if isinstance(e, Progress)] == [1, 2]
    assert isinstance(seen[-1], FinishedImage)


def test_a_step_that_the_device_does_not_come_back_from_is_noticed(harness: Harness) -> None:
    steps, events = Steps(harness), harness.submit(num_inference_steps=1)
    steps.given(1)
    assert harness.loop.alive
    harness.clock.now = 10.0 + 20 * 1.1 + 1
    assert not harness.loop.alive
    steps.done(1)
    assert isinstance(until_the_end(events)[-1], FinishedImage)
    assert harness.loop.alive


def test_a_device_that_is_lost_in_a_step_ends_the_worker(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: FakeMark) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(FakeMark, "synchronize", lost)
    steps, events = Steps(harness), harness.submit()
    steps.given(1)
    harness.executor.lost = True
    steps.nearly_done()
    harness.loop.join(PATIENCE)
    assert not harness.loop.alive
    assert not [e for e in drain(events) if isinstance(e, FinishedImage | Failed)]


def test_a_worker_that_is_idle_after_a_step_failed_is_alive(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(self: FakeMark) -> None:
        raise RuntimeError("a step")

    monkeypatch.setattr(FakeMark, "synchronize", failed)
    steps, events = Steps(harness), harness.submit(num_inference_steps=1)
    steps.given(1)
    steps.nearly_done()  # and is waited for
    assert isinstance(until_the_end(events)[-1], Failed)
    harness.clock.now += 1000.0
    assert harness.loop.alive


@pytest.mark.parametrize("how", ["no preview", "spoilt preview"])
def test_a_preview_that_fails_is_left_out_and_no_step_is_taken_twice(
    harness: Harness, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """When it fails the latents of the whole batch have moved: another try would move them once more."""
    spoilt = harness.submit(how, num_inference_steps=3, preview_interval=1)
    other = harness.submit("fine", num_inference_steps=3, preview_interval=1)
    harness.loop.start()
    kinds = {name: Counter(map(type, until_the_end(e))) for name, e in (("spoilt", spoilt), ("other", other))}
    assert {name: (k[Progress], k[PreviewPixels]) for name, k in kinds.items()} == {"spoilt": (3, 0), "other": (3, 2)}
    assert all(k[FinishedImage] == 1 for k in kinds.values())
    assert harness.executor.batches == [2, 2, 2]
    assert harness.executor.steps_taken == {how: 3, "fine": 3}
    assert caplog.text.count("no preview of request test after step") == 2


def test_a_fault_is_answered_once_and_others_go_on(harness: Harness) -> None:
    harness.executor.faults = {"bad": ValueError("boom")}
    bad, good = harness.submit("bad", num_images=3), harness.submit()
    harness.loop.start()
    (*_, failed) = until_the_end(bad)
    assert isinstance(failed, Failed)
    assert str(failed.error) == "boom"
    assert isinstance(until_the_end(good)[-1], FinishedImage)
    assert bad.empty()


def test_out_of_memory_is_resource_exhausted_with_figures_and_the_loop_goes_on(harness: Harness) -> None:
    harness.executor.faults = {"huge": torch.OutOfMemoryError("tried to allocate 9 GiB")}
    huge, good = harness.submit("huge"), harness.submit()
    harness.loop.start()
    (*_, failed) = until_the_end(huge)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, DeviceMemoryError)
    for word in ("allocated", "reserved", "free", "tried to allocate 9 GiB"):
        assert word in str(failed.error)
    assert isinstance(until_the_end(good)[-1], FinishedImage)
    assert harness.executor.freed == 3, "for the two together, for it alone, and when that was tried again"


def test_an_overflow_quarantines_the_denoiser_and_the_image_is_made_again(harness: Harness) -> None:
    events = harness.submit("overflow")
    harness.loop.start()
    seen = until_the_end(events)
    assert [e.step for e in seen if isinstance(e, Progress)] == [1, 2, 1, 2]
    assert isinstance(seen[-1], FinishedImage)
    assert (harness.executor.quarantines, harness.executor.resets) == (1, 1)


def test_a_cancelled_request_is_not_worked_on(harness: Harness) -> None:
    cancelled, good = harness.submit(), harness.submit()
    harness.loop.cancel(0)
    harness.loop.start()
    until_the_end(good)
    assert cancelled.empty(), "not even its place in the queue was told"


def test_a_passed_deadline_is_said(harness: Harness) -> None:
    late, good = harness.submit(timeout=5.0), harness.submit()
    harness.clock.now = 6.0
    harness.loop.start()
    (*_, failed) = until_the_end(late)
    assert "2 of 2 steps were still to do" in str(failed.error)  # type: ignore[union-attr]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, DeadlinePassedError)
    assert isinstance(until_the_end(good)[-1], FinishedImage)


def test_nobody_is_given_up_for_images_that_leave_with_their_request(harness: Harness) -> None:
    """Behind the urgent one two of three images would be late, so their request goes, and the other has time."""
    costs = CostTable([StepCost(64, 64, 1, 1.0)])
    harness.loop = WorkerLoop(harness.executor, Planner(costs, BatchPolicy(1)), clock=harness.clock)
    several = harness.submit(num_images=3, num_inference_steps=8, timeout=30.1)
    other = harness.submit(num_inference_steps=8, timeout=32.1)
    urgent = harness.submit(num_inference_steps=20, priority=1)
    harness.loop.start()
    assert isinstance(until_the_end(urgent)[-1], FinishedImage)
    assert isinstance(until_the_end(other)[-1], FinishedImage)
    ended = until_the_end(several, images=3)
    assert isinstance(ended[-1], Failed)
    assert not [e for e in ended if isinstance(e, Progress)]


def test_what_a_decode_costs_is_learnt_where_it_had_the_device_for_itself(harness: Harness) -> None:
    costs = CostTable([StepCost(64, 64, 1, 0.1)])
    harness.loop = WorkerLoop(harness.executor, Planner(costs, BatchPolicy(1)), clock=harness.clock)
    alone, crowded = beside(harness, "decode", "alone"), beside(harness, "decode", "crowded")
    harness.loop.start()
    for prompt, mark in (("alone", alone), ("crowded", crowded)):
        events = harness.submit(prompt)
        until_begun(mark)
        if mark is crowded:
            until_the_end(harness.submit())
        harness.clock.now += 5.0 if mark is alone else 2.0  # the less of two counts, where both do
        mark.passed.set()
        assert isinstance(until_the_end(events)[-1], FinishedImage)
        harness.loop.call(lambda: None).result(PATIENCE)
        assert costs.decode(64, 64) == 5.0


def test_what_a_step_costs_is_learnt_where_it_had_the_device_for_itself(harness: Harness) -> None:
    """With a decode under way as it begins, nothing is; with none, something is."""
    costs, mark = harness.loop._planner._costs, beside(harness, "decode", "slow")
    harness.loop.start()
    slow = harness.submit("slow")
    until_begun(mark)
    assert isinstance(until_the_end(harness.submit(width=128))[-1], FinishedImage)
    assert not costs.measured(64, 128)
    mark.passed.set()
    assert isinstance(until_the_end(slow)[-1], FinishedImage)
    assert isinstance(until_the_end(harness.submit(width=128))[-1], FinishedImage)
    assert costs.measured(64, 128) == {1: 1.0}


def test_what_a_step_costs_is_not_learnt_where_a_prompt_is_encoded_beside_it(harness: Harness) -> None:
    costs, mark = harness.loop._planner._costs, beside(harness, "encode", "late")
    steps, events = Steps(harness), harness.submit(width=128, num_inference_steps=1)
    steps.given(1)
    harness.submit("late")
    until_begun(mark)
    steps.done(1)
    assert isinstance(until_the_end(events)[-1], FinishedImage)
    assert not costs.measured(64, 128)


def test_the_step_that_runs_is_reckoned_with_when_a_deadline_is_judged(harness: Harness) -> None:
    """Its request is refused at once, and not when the step is done."""
    steps, running = Steps(harness), harness.submit(num_inference_steps=1)
    steps.given(1)
    assert isinstance(until_the_end(harness.submit(timeout=2.5))[-1], Failed)  # 1.1 s and then twice as much
    steps.done(1)
    assert isinstance(until_the_end(running)[-1], FinishedImage)


@pytest.mark.parametrize(("encoded", "learnt"), [(2, 1.0), (1, 2.0), (0, 0.0)])
def test_what_encoding_costs_is_learnt_by_prompt(harness: Harness, encoded: int, learnt: float) -> None:
    """Of a guided request, whose negative prompt is mostly known already."""
    costs, mark = harness.loop._planner._costs, beside(harness, "encode", "fine")
    harness.executor.encoded = encoded
    harness.loop.start()
    events = harness.submit(guidance_scale=2.0)
    until_begun(mark)
    harness.clock.now += 2.0
    mark.passed.set()
    assert isinstance(until_the_end(events)[-1], FinishedImage)
    assert costs.encode() == learnt


def test_a_batch_without_memory_is_halved_and_nobody_fails(harness: Harness) -> None:
    harness.executor.largest = 1
    requests = [harness.submit() for _ in range(4)]
    harness.loop.start()
    assert all(isinstance(until_the_end(events)[-1], FinishedImage) for events in requests)
    assert harness.executor.batches[:3] == [4, 2, 1]
    assert set(harness.executor.batches[2:]) == {1}


def test_every_sequence_of_a_bad_batch_starts_over_and_a_hopeless_one_fails_alone(harness: Harness) -> None:
    """The second one is decoded when the engine is in quarantine already; it was denoised before."""
    harness.executor.gate.clear()
    hopeless, other = harness.submit("never finite"), harness.submit("overflow")
    harness.loop.start()
    harness.executor.gate.set()
    failed = until_the_end(hopeless)[-1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, NonFiniteError)
    assert isinstance(until_the_end(other)[-1], FinishedImage)


def test_those_that_wait_are_told_where_they_stand(harness: Harness) -> None:
    harness.executor.gate.clear()
    harness.submit(width=128), harness.submit(width=192)
    events = harness.submit(width=256, height=256)
    harness.loop.start()
    assert events.get(timeout=PATIENCE) == Queued(2, pytest.approx(1e3 * (2 * 1.2 + 2 * 1.2 * 1.5)))
    harness.executor.gate.set()
    assert [e.position for e in until_the_end(events) if isinstance(e, Queued)] == [1, 0]


def test_a_device_that_does_not_come_back_is_noticed(harness: Harness) -> None:
    assert not harness.loop.alive, "not started"
    harness.executor.gate.clear()
    events = harness.submit()
    harness.loop.start()
    assert harness.executor.at_gate.wait(PATIENCE)
    assert harness.loop.alive
    harness.clock.now = 10.0 + 20 * 1.1 + 1
    assert not harness.loop.alive
    harness.executor.gate.set()
    assert isinstance(until_the_end(events)[-1], FinishedImage)
    assert harness.loop.alive


def beside(harness: Harness, stage: str, prompt: str) -> FakeMark:
    """Lets a stage of the request with this prompt run beside the others' steps."""
    mark = FakeMark()
    harness.executor.marks[stage, prompt] = [mark]
    return mark


def until_begun(mark: FakeMark) -> None:
    until(lambda: mark.looks > 0)


def test_work_is_done_on_the_devices_thread_and_its_errors_are_the_callers(harness: Harness) -> None:
    harness.loop.start()
    assert harness.loop.call(threading.current_thread).result(PATIENCE) is harness.loop
    with pytest.raises(ZeroDivisionError):
        harness.loop.call(lambda: 1 // 0).result(PATIENCE)
    assert isinstance(until_the_end(harness.submit())[-1], FinishedImage)


def test_a_device_that_is_lost_ends_the_worker_and_no_request(harness: Harness) -> None:
    """Whoever sees that the worker is not alive replaces it, and starts its requests over."""
    harness.executor.faults = {"unlucky": RuntimeError("an illegal memory access was encountered")}
    harness.executor.lost = True
    unlucky, other = harness.submit("unlucky"), harness.submit()
    harness.loop.start()
    harness.loop.join(PATIENCE)
    assert not harness.loop.alive
    assert not [e for events in (unlucky, other) for e in drain(events) if isinstance(e, FinishedImage | Failed)]
    assert not harness.executor.steps_taken, "nothing more is given to it"


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_others_go_on_while_a_request_is_encoded_or_decoded(harness: Harness, stage: str) -> None:
    mark = beside(harness, stage, "slow")
    slow = harness.submit("slow")
    harness.loop.start()
    until_begun(mark)
    for number in range(3):
        assert isinstance(until_the_end(harness.submit(str(number)))[-1], FinishedImage)
    waiting_for_it = [slow.get(timeout=PATIENCE) for _ in range(2 if stage == "encode" else 4)]
    assert slow.empty()
    assert sum(isinstance(e, Progress) for e in waiting_for_it) == (0 if stage == "encode" else 2)
    mark.passed.set()
    assert isinstance(until_the_end(slow)[-1], FinishedImage)
    assert harness.executor.batches == [1] * 8


def test_a_request_that_is_cancelled_while_it_is_decoded_leaves_nothing(harness: Harness) -> None:
    """Not before the device is done with it: until then its memory is not to be used for anything else."""
    mark = beside(harness, "decode", "unwanted")
    unwanted = harness.submit("unwanted")
    harness.loop.start()
    until_begun(mark)
    harness.loop.cancel(0)
    until_the_end(harness.submit())
    (task,) = harness.loop._side_tasks
    assert task.sequence.request.prompt == "unwanted"
    assert not harness.loop._planner._aside
    mark.passed.set()
    until_the_end(harness.submit())
    assert not harness.loop._side_tasks
    assert not [e for e in drain(unwanted) if isinstance(e, FinishedImage | Failed)]


def drain(events: "queue.SimpleQueue[LoopEvent]") -> list[LoopEvent]:
    return [events.get() for _ in range(events.qsize())]


def test_what_goes_wrong_beside_the_steps_is_seen_when_it_is_collected(harness: Harness) -> None:
    mark = beside(harness, "decode", "overflow")
    overflow = harness.submit("overflow")
    harness.loop.start()
    until_the_end(harness.submit())
    assert harness.executor.quarantines == 0
    mark.passed.set()
    seen = until_the_end(overflow)
    assert [e.step for e in seen if isinstance(e, Progress)] == [1, 2, 1, 2]
    assert isinstance(seen[-1], FinishedImage)
    assert (harness.executor.quarantines, harness.executor.resets) == (1, 1)


def test_memory_is_freed_when_nothing_runs_beside_the_steps(harness: Harness) -> None:
    mark = beside(harness, "decode", "slow")
    slow = harness.submit("slow")
    harness.loop.start()
    until_the_end(harness.submit())
    harness.executor.faults = {"huge": torch.OutOfMemoryError("tried to allocate 9 GiB")}
    huge = harness.submit("huge")
    looks = mark.looks
    while mark.looks < looks + 3:
        time.sleep(0.001)
    assert harness.executor.freed == 0
    mark.passed.set()
    assert isinstance(until_the_end(slow)[-1], FinishedImage)
    assert isinstance(until_the_end(huge)[-1], Failed)
    assert harness.executor.freed == 2


def test_a_decode_that_does_not_come_back_is_noticed(harness: Harness) -> None:
    mark = beside(harness, "decode", "slow")
    slow = harness.submit("slow")
    harness.loop.start()
    until_the_end(harness.submit())
    assert harness.loop.alive
    harness.clock.now = 11.0
    assert not harness.loop.alive
    mark.passed.set()
    assert isinstance(until_the_end(slow)[-1], FinishedImage)
    until_the_end(harness.submit())
    assert harness.loop.alive


class Passing:
    """A mark that the device passes at a time."""

    def __init__(self, at: float) -> None:
        self.at = at

    def query(self) -> bool:
        return time.monotonic() >= self.at

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.monotonic()))


class Quick(ScriptedExecutor):
    """Its steps take 20 ms, measured when they are seen done."""

    def __init__(self) -> None:
        super().__init__()
        self.free = self.seen = 0.0

    def denoise(self, sequences: list[ImageSequence]) -> Pending[float]:  # type: ignore[override]
        started = time.monotonic()
        self.free = max(started, self.free) + 0.02

        def finish() -> float:
            began, self.seen = max(started, self.seen), time.monotonic()
            return self.seen - began

        return Pending(finish, Passing(self.free))


def test_a_step_that_is_done_sooner_than_it_should_be_is_seen() -> None:
    """Else the device would stand still, and what was waited for would become the step's cost."""
    dear = 1.0
    costs = CostTable([StepCost(64, 64, 1, dear)])
    loop = WorkerLoop(Quick(), Planner(costs, BatchPolicy(1)))
    loop.start()
    events: queue.SimpleQueue[LoopEvent] = queue.SimpleQueue()
    request = dataclasses.replace(a_request(), num_inference_steps=10)
    loop.submit(make_sequences(request, ((1, 2),), key=0, shift=3.0, now=time.monotonic()), events.put)
    steps = [e.step_ms for e in until_the_end(events) if isinstance(e, Progress)]
    assert sorted(steps)[len(steps) // 2] < 1e3 * dear / 2
    assert costs.step(64, 64) < dear / 2
    loop.stop()


class OneBad(ScriptedExecutor):
    """The first image of a request cannot take its step, alone or with others."""

    def __init__(self) -> None:
        super().__init__()
        self.decoded: Counter[str] = Counter()

    def denoise(self, sequences: list[ImageSequence]) -> Pending[float]:  # type: ignore[override]
        if any(s.image_index == 0 and s.request.prompt == "bad" for s in sequences):
            raise ValueError("boom")
        self.steps_taken.update(s.request.prompt for s in sequences)
        return Pending(lambda: 1.0)

    def decode(self, sequence: ImageSequence) -> Pending[Pixels]:
        self.decoded[sequence.request.prompt] += 1
        return super().decode(sequence)


def test_nothing_is_done_any_more_for_a_request_that_has_failed() -> None:
    executor = OneBad()
    harness = Harness(executor)
    bad = harness.submit("bad", num_images=4, num_inference_steps=1)
    harness.loop.start()
    assert isinstance(until_the_end(bad)[-1], Failed)
    assert isinstance(until_the_end(harness.submit())[-1], FinishedImage)
    assert (executor.steps_taken["bad"], executor.decoded["bad"]) == (0, 0)


def test_a_restart_without_memory_harms_nobody(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(sequence: ImageSequence) -> None:
        harness.executor.resets += 1
        if harness.executor.resets == 1:
            raise torch.OutOfMemoryError("noise")

    monkeypatch.setattr(harness.executor, "reset", reset)
    overflow, good = harness.submit("overflow"), harness.submit()
    harness.loop.start()
    assert isinstance(until_the_end(overflow)[-1], FinishedImage)
    assert isinstance(until_the_end(good)[-1], FinishedImage)


def test_a_request_is_known_to_have_started_before_its_prompt_can_hang(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or nobody would know which request it was."""
    encode, known = harness.executor.encode, []

    def deadly(sequence: ImageSequence) -> Pending[None]:
        known.append([type(e) for e in drain(events)])
        return encode(sequence)

    monkeypatch.setattr(harness.executor, "encode", deadly)
    events = harness.submit(num_inference_steps=1)
    harness.loop.start()
    until_the_end(events)
    assert SequenceStarted in known[0]


def test_a_decode_without_memory_does_not_end_sharing(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, failed = harness.executor.decode, threading.Event()

    def once_without_memory(sequence: ImageSequence) -> Pending[Pixels]:
        if not failed.is_set():
            failed.set()
            raise torch.OutOfMemoryError("decode")
        return decode(sequence)

    monkeypatch.setattr(harness.executor, "decode", once_without_memory)
    first = harness.submit(num_inference_steps=1)
    harness.loop.start()
    assert isinstance(until_the_end(first)[-1], FinishedImage)
    harness.executor.at_gate.clear()
    harness.executor.gate.clear()
    harness.submit(width=128)
    assert harness.executor.at_gate.wait(PATIENCE)
    several = [harness.submit() for _ in range(4)]
    harness.executor.batches.clear()
    harness.executor.gate.set()
    for events in several:
        assert isinstance(until_the_end(events)[-1], FinishedImage)
    assert max(harness.executor.batches) > 1


def test_a_device_that_does_not_come_back_when_it_is_asked_after_an_error_is_noticed(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, back = threading.Event(), threading.Event()

    def usable() -> bool:
        asked.set()
        return back.wait(PATIENCE)

    monkeypatch.setattr(harness.executor, "usable", usable)
    harness.executor.faults = {"bad": ValueError("boom")}
    steps = Steps(harness)
    harness.submit("good", num_inference_steps=2, priority=4)
    steps.given(1)
    harness.submit("bad", priority=1)
    steps.nearly_done()
    until(lambda: len(harness.executor.batches) == 2)
    steps.done(1)
    assert asked.wait(PATIENCE)
    assert harness.loop.alive
    harness.clock.now += 1000.0
    assert not harness.loop.alive
    back.set()


class OneByOne(ScriptedExecutor):
    """Each step waits for leave, where it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.leave, self.begun = threading.Semaphore(0), 0

    def denoise(self, sequences: list[ImageSequence]) -> Pending[float]:  # type: ignore[override]
        self.begun += 1
        assert self.leave.acquire(timeout=PATIENCE)
        return super().denoise(sequences)


def test_what_is_known_before_a_step_is_told_before_it() -> None:
    """Also where giving a step to the device is doing it."""
    executor = OneByOne()
    harness = Harness(executor)
    harness.submit("first", num_inference_steps=2, priority=1)
    harness.loop.start()
    until(lambda: executor.begun == 1)
    late = harness.submit("late", priority=5, timeout=5.0)
    harness.clock.now = 6.0
    executor.leave.release()
    until(lambda: executor.begun == 2)
    assert isinstance(late.get(timeout=PATIENCE), Failed)
    executor.leave.release(100)


def test_a_device_that_is_lost_is_said_whatever_notices_it_first(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(mark: FakeMark) -> bool:
        raise RuntimeError("an illegal memory access was encountered")

    steps = Steps(harness)
    harness.submit()
    steps.given(1)
    harness.executor.lost = True
    monkeypatch.setattr(FakeMark, "synchronize", lost)
    monkeypatch.setattr(FakeMark, "query", lost)
    steps.nearly_done()
    harness.loop.join(PATIENCE)
    assert not harness.loop.alive
    assert "the device cannot be used any more" in caplog.text
