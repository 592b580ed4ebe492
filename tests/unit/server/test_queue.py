"""Who gets which worker when, what waits, and what is refused; with workers that are ordinary objects."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from server.config import ModelConfig
from server.costs import CostTable
from server.errors import (
    DeadlinePassedError,
    ModelNotReadyError,
    PoisonRequestError,
    QueueFullError,
    QueueTimeoutError,
    ShuttingDownError,
    WorkerLostError,
    ZServeError,
)
from server.frontend.assignment import Place
from server.frontend.forecast import Forecast
from server.frontend.metrics import Metrics
from server.frontend.queue import ModelQueue
from server.frontend.serving import Serving
from server.frontend.workers import WorkerState
from server.queue_policy import LevelPolicy, QueuePolicy, TimeoutAction
from server.requests import (
    Completed,
    Event,
    GenerationRequest,
    Image,
    ImageFormat,
    Progress,
    Queued,
    Started,
    StepCost,
    Timings,
)
from tests.fakes import FakeClock, a_request

SECOND = CostTable([StepCost(64, 64, 1, 0.5)])  # a request of a_request's two steps takes a second
STRICT = QueuePolicy(default=LevelPolicy(max_size=3))


@dataclass(eq=False)
class FakeWorker:
    """Answers at once, or breaks off after `breaks_after` events."""

    name: str = "fake"
    state: WorkerState = WorkerState.READY
    reason: str = ""
    costs: CostTable = field(default_factory=lambda: SECOND)
    breaks_after: int | None = None
    timings: Timings = field(default_factory=Timings)
    served: list[str] = field(default_factory=list)
    requests: list[GenerationRequest] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.served.append(request.request_id)
        self.requests.append(request)
        image = Image(0, request.seed, 64, 64, ImageFormat.RAW, b"")
        done = Completed(self.timings, (), prompt_cached=False, denoiser_forwards=2)
        for number, event in enumerate((Started(self.name), Progress(1, 2, 0), image, Progress(2, 2, 0), done)):
            if number == self.breaks_after:
                self.state = WorkerState.RESTARTING
                raise WorkerLostError("gone")
            yield event


@dataclass(eq=False)
class StuckWorker(FakeWorker):
    """Begins, and does nothing more until its call is closed."""

    closed: bool = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Started(self.name)
        try:
            await asyncio.Event().wait()
        finally:
            self.closed = True


@dataclass(eq=False)
class HalfwayWorker(FakeWorker):
    """Has taken one of two steps, and does nothing more until its call is closed."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Started(self.name)
        yield Progress(1, 2, 0)
        await asyncio.Event().wait()


@dataclass(eq=False)
class StoppedWorker(FakeWorker):
    """Begins, and breaks off when it is stopped."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Started(self.name)
        self.begun.set()
        await self.stop.wait()
        raise WorkerLostError("stopped")


def make(*workers: FakeWorker, clock: FakeClock | None = None, **config: object) -> ModelQueue:
    model = ModelConfig("demo", **{"max_batch_size": 1, "queue": STRICT, **config})  # type: ignore[arg-type]
    return ModelQueue(model, workers, clock or FakeClock())  # type: ignore[arg-type]


def enter(queue: ModelQueue, count: int = 1, **changes: object) -> list[Place]:
    return [queue.enter(replace(a_request(), **changes)) for _ in range(count)]  # type: ignore[arg-type]


async def test_a_worker_gets_its_window_and_the_rest_wait_in_turn() -> None:
    queue = make(FakeWorker())
    places = enter(queue, 4)
    assert [p.worker is not None for p in places] == [True, True, False, False]
    queue.leave(places[0])
    assert [p.worker is not None for p in places[1:]] == [True, True, False]


async def test_a_more_urgent_request_is_not_kept_from_a_full_worker() -> None:
    queue = make(FakeWorker())
    enter(queue, 3)
    (urgent,) = enter(queue, priority=1)
    assert urgent.worker is not None


async def test_even_ever_more_urgent_requests_find_room_in_a_worker_only_so_often() -> None:
    queue = make(FakeWorker())
    for priority in (8, 7, 6, 5, 4):
        enter(queue, 2, priority=priority)
    assert (queue.running, queue.waiting) == (8, 2)


async def test_the_worker_with_the_least_to_do_is_chosen() -> None:
    queue = make(FakeWorker("a"), FakeWorker("b"))
    (large,) = enter(queue, num_inference_steps=20)
    small = enter(queue, 2)
    assert large.worker is not small[0].worker is small[1].worker


FOUR_SECONDS = CostTable([StepCost(64, 64, 1, 2.0)])


async def test_each_worker_is_forecast_by_its_own_costs() -> None:
    queue = make(FakeWorker("slow", costs=FOUR_SECONDS), FakeWorker("fast"), queue=QueuePolicy())
    waiting = enter(queue, 7)[4:]
    assert [p.standing.estimated_start_ms for p in waiting if p.standing] == [2000.0, 3000.0, 4000.0]


async def test_the_worker_that_is_done_first_is_chosen() -> None:
    slow, fast = FakeWorker("slow", costs=FOUR_SECONDS), FakeWorker("fast")
    queue = make(slow, fast)
    (place,) = enter(queue, timeout=2.0)
    assert place.worker is fast
    (large,) = enter(queue, num_inference_steps=20)
    assert large.worker is fast


async def test_what_only_a_slower_worker_is_free_for_is_refused_where_that_takes_too_long() -> None:
    queue = make(FakeWorker("fast"), FakeWorker("slow", costs=FOUR_SECONDS))
    for place in enter(queue, 2, num_inference_steps=20, priority=1):
        assert place.worker is queue.workers[0]
    with pytest.raises(DeadlinePassedError, match="needs 4 s of the device, which is free for it in 0 s"):
        enter(queue, timeout=3.0)
    (late,) = enter(queue, timeout=5.0)
    assert late.worker is queue.workers[1]


async def test_while_nothing_was_measured_the_worker_with_the_fewest_requests_is_chosen() -> None:
    queue = make(FakeWorker("a", costs=CostTable()), FakeWorker("b", costs=CostTable()), max_batch_size=2)
    assert len({place.worker for place in enter(queue, 2)}) == 2


async def test_who_waits_starts_when_the_first_of_the_workers_is_free() -> None:
    queue = make(FakeWorker("a"), FakeWorker("b"))
    enter(queue, num_inference_steps=20)
    *_, waiting = enter(queue, 4)  # two have the other worker, and one waits behind the large one
    assert waiting.standing == Queued(4, 2000.0)


async def test_of_a_request_that_has_started_the_steps_to_go_are_waited_for() -> None:
    queue = make(HalfwayWorker())
    events = Serving(queue, a_request(), max_retries=3, metrics=Metrics()).events()
    while not isinstance(await anext(events), Progress):
        pass
    _, waiting = enter(queue, 2)
    assert waiting.standing == Queued(1, 1500.0)
    await events.aclose()


async def test_nobody_stands_behind_a_request_that_has_started() -> None:
    queue = make(FakeWorker())
    started, _ = enter(queue, 2)
    started.started = True
    (waiting,) = enter(queue)
    assert waiting.standing is not None
    assert waiting.standing.position == 1


async def test_only_who_has_moved_up_is_told() -> None:
    queue = make(FakeWorker())
    *_, waiting = enter(queue, 3)
    waiting.moved.clear()
    queue._tell_all()
    assert not waiting.moved.is_set()


async def test_of_levels_without_end_the_first_are_shown_and_those_where_somebody_waits() -> None:
    queue = make(FakeWorker(), queue=QueuePolicy(levels=1000))
    enter(queue, 4, priority=500)
    assert queue.depths == {**dict.fromkeys(range(1, 17), 0), 500: 2}


async def test_places_learn_where_they_stand() -> None:
    queue = make(FakeWorker())
    (*_, third, fourth) = enter(queue, 4)
    assert [(p.standing.position, p.standing.estimated_start_ms) for p in (third, fourth) if p.standing] == [
        (2, 2000.0),
        (3, 3000.0),
    ]
    third.moved.clear(), fourth.moved.clear()
    queue.leave(third)
    await asyncio.wait_for(fourth.moved.wait(), 100)
    assert fourth.standing is not None
    assert (fourth.standing.position, fourth.standing.estimated_start_ms) == (2, 2000.0)


async def test_who_waits_again_after_a_loss_is_told_where_it_stands_now() -> None:
    worker = StoppedWorker()
    queue = make(worker)
    places = enter(queue, 2)
    events = Serving(queue, a_request(), max_retries=3, metrics=Metrics()).events()
    assert await anext(events) == Queued(2, 2000.0)
    for place in places:
        queue.leave(place)
    assert isinstance(await anext(events), Started)
    worker.state = WorkerState.RESTARTING
    worker.stop.set()
    assert await anext(events) == Queued(0)
    await events.aclose()


async def test_who_waits_while_no_worker_serves_is_promised_no_start() -> None:
    worker = FakeWorker(state=WorkerState.RESTARTING)
    queue = make(worker)
    first, second = enter(queue, 2)
    assert (first.standing, second.standing) == (Queued(0), Queued(1))
    assert queue.retry_after == 1.0


async def test_a_full_queue_refuses_with_advice() -> None:
    queue = make(FakeWorker())
    enter(queue, 5)
    with pytest.raises(QueueFullError, match="3 requests of priority 4 waiting") as refusal:
        enter(queue)
    assert refusal.value.retry_after == 2.0
    enter(queue, priority=5)  # a level of its own


async def test_without_a_bound_any_number_waits() -> None:
    queue = make(FakeWorker(), queue=QueuePolicy(default=LevelPolicy(max_size=None)))
    enter(queue, 200)
    assert queue.waiting == 198


async def test_what_cannot_meet_its_deadline_is_refused_at_once() -> None:
    queue = make(FakeWorker())
    with pytest.raises(DeadlinePassedError, match="needs 1 s of the device"):
        enter(queue, timeout=0.9)
    enter(queue, 4, priority=2)
    with pytest.raises(DeadlinePassedError, match="free for it in 4 s"):
        enter(queue, timeout=3.5)
    (urgent,) = enter(queue, priority=2, timeout=3.5)
    assert urgent.worker is not None


@pytest.mark.parametrize("larger", [{"num_images": 2}, {"num_inference_steps": 4}, {"guidance_scale": 2.0}])
async def test_a_deadline_is_held_against_all_that_was_asked_for(larger: dict[str, Any]) -> None:
    with pytest.raises(DeadlinePassedError, match="needs 2 s of the device"):
        enter(make(FakeWorker()), timeout=1.9, **larger)


async def test_an_arrival_is_forecast_once_and_not_who_is_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue may be a thousand long, and all of this runs on the frontend's only event loop."""
    queue = make(FakeWorker(), queue=QueuePolicy())
    enter(queue, 4, priority=1)
    enter(queue, 20, priority=5)
    forecasts, lengths = queue._assignment.forecasts, []

    def counted(waiting: Sequence[Place]) -> list[Forecast] | None:
        lengths.append(len(waiting))
        return forecasts(waiting)

    monkeypatch.setattr(queue._assignment, "forecasts", counted)
    (place,) = enter(queue, priority=1, timeout=100.0)
    assert lengths == [3]
    assert place.standing == Queued(4, 4000.0)


async def test_a_deadline_that_shared_steps_may_meet_is_accepted() -> None:
    """Four seconds of waiting are forecast; batching may make 2.8 of it, and the request itself takes one."""
    queue = make(FakeWorker())
    enter(queue, 4, priority=2)
    with pytest.raises(DeadlinePassedError):
        enter(queue, timeout=3.7)
    (waiting,) = enter(queue, timeout=3.9)
    assert waiting.worker is None


@pytest.mark.parametrize("action", TimeoutAction)
async def test_queue_timeouts(action: TimeoutAction) -> None:
    level = LevelPolicy(timeout=5.0, on_timeout=action, request_may_set_timeout=True)
    clock = FakeClock()
    queue = make(FakeWorker(), clock=clock, queue=QueuePolicy(default=level))
    (*_, early, late) = enter(queue, 4, queue_timeout=3.0)
    assert queue.patience(early) == 3.0
    clock.now = 3.0
    if action is TimeoutAction.REJECT:
        with pytest.raises(QueueTimeoutError):
            queue.time_out(early)
        return
    queue.time_out(early)
    (after,) = enter(queue)
    queue.time_out(late)
    order = sorted((early, late, after), key=lambda p: p.claim.rank(3.0))
    assert order == [after, early, late]
    assert queue.patience(early) is None


@pytest.mark.parametrize("started", [True, False])
async def test_who_had_a_worker_in_time_is_not_timed_out_by_the_queue_after_a_loss(started: bool) -> None:
    clock, worker = FakeClock(), FakeWorker()
    queue = make(worker, clock=clock, queue=QueuePolicy(default=LevelPolicy(timeout=5.0)))
    (place,) = enter(queue)
    place.started = started
    worker.state = WorkerState.RESTARTING
    queue.lose(place, reached=True)
    queue.rejoin(place)
    clock.now = 6.0
    assert queue.patience(place) is None
    queue.time_out(place)
    assert queue.waiting == 1


async def test_deadlines_are_reckoned_while_the_only_worker_restarts() -> None:
    worker, clock = FakeWorker(state=WorkerState.RESTARTING), FakeClock()
    queue = make(worker, clock=clock)
    with pytest.raises(DeadlinePassedError, match="needs 1 s of the device"):
        enter(queue, timeout=0.9)
    (place,) = enter(queue, timeout=1.5)
    assert queue.patience(place) == pytest.approx(0.5)
    clock.now = 0.5
    with pytest.raises(DeadlinePassedError, match="1 s from now, cannot be met"):
        queue.time_out(place)


@pytest.mark.parametrize(("state", "needed"), [(WorkerState.READY, 1.0), (WorkerState.RESTARTING, 4.0)])
async def test_who_waits_may_wait_for_as_long_as_the_fastest_worker_that_serves_needs(
    state: WorkerState, needed: float
) -> None:
    queue = make(FakeWorker("fast", state), FakeWorker("slow", costs=FOUR_SECONDS))
    enter(queue, 4, priority=1)
    (waiting,) = enter(queue, timeout=20.0)
    assert waiting.worker is None
    assert queue.patience(waiting) == 20.0 - needed


async def test_a_model_without_a_worker_refuses_but_waits_for_one_that_restarts() -> None:
    with pytest.raises(ModelNotReadyError) as refusal:
        enter(make(FakeWorker(state=WorkerState.STARTING)))
    assert refusal.value.retry_after == 5.0
    worker = FakeWorker(state=WorkerState.RESTARTING)
    queue = make(worker)
    (place,) = enter(queue)
    worker.state = WorkerState.READY
    queue.change()
    assert place.worker is worker  # type: ignore[comparison-overlap]


async def serve(
    queue: ModelQueue, max_retries: int = 3, metrics: Metrics | None = None, **changes: object
) -> list[Event]:
    request = replace(a_request(), **changes)  # type: ignore[arg-type]
    serving = Serving(queue, request, max_retries=max_retries, metrics=metrics or Metrics())
    return [event async for event in serving.events()]


async def test_a_lost_request_goes_on_with_another_worker_and_no_image_comes_twice() -> None:
    queue = make(FakeWorker("a", breaks_after=3), FakeWorker("b"))
    events = await serve(queue)
    assert [e.attempt for e in events if isinstance(e, Started)] == [1, 2]
    assert sum(isinstance(e, Image) for e in events) == 1
    assert isinstance(events[-1], Completed)
    assert queue.running == queue.waiting == 0


async def test_a_worker_is_told_how_long_a_request_has_waited() -> None:
    delaying = QueuePolicy(default=LevelPolicy(timeout=0.05, on_timeout=TimeoutAction.DELAY))
    worker = FakeWorker(state=WorkerState.RESTARTING)
    queue = make(worker, clock=time.monotonic, queue=delaying)  # type: ignore[arg-type]
    queue.loaded = True
    serving = asyncio.create_task(serve(queue))
    while not any(place.claim.delayed for place in queue._turns.items()):  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.01)
    worker.state = WorkerState.READY
    queue.change()
    await serving
    (request,) = worker.requests
    assert request.waited >= 0.05
    assert request.delayed


async def test_the_time_before_it_had_a_worker_is_part_of_what_a_request_took() -> None:
    """And is no more there for the worker to use."""
    worker = FakeWorker(state=WorkerState.RESTARTING, timings=Timings(queue_ms=7.0, total_ms=1e9))
    queue = make(worker)
    serving = asyncio.create_task(serve(queue, timeout=100.0))
    await asyncio.sleep(0)
    worker.state = WorkerState.READY
    queue.change()
    completed = (await serving)[-1]
    assert isinstance(completed, Completed)
    (request,) = worker.requests
    assert request.waited > 0
    assert request.timeout == 100.0 - request.waited
    assert completed.timings.queue_ms == 7.0 + 1e3 * request.waited
    assert 1e3 * request.waited <= completed.timings.total_ms < 1e9, "measured here, from the arrival"


async def test_steps_that_are_taken_again_are_not_counted_twice() -> None:
    queue = make(FakeWorker())
    (place,) = enter(queue)
    needed = queue._assignment.seconds(place)
    for step, left in ((1, 0.5), (2, 0.0), (1, 0.5), (2, 0.0)):  # the second two after a restart from noise
        place.steps_done[0] = step
        assert queue._assignment.seconds(place) == pytest.approx(left * needed)


async def test_the_steps_to_go_are_those_of_all_the_images() -> None:
    queue = make(FakeWorker())
    (place,) = enter(queue, num_images=2)
    for done, left in (({}, 2.0), ({0: 2}, 1.0), ({0: 2, 1: 1}, 0.5)):
        place.steps_done = done
        assert queue._assignment.seconds(place) == pytest.approx(left)


async def test_what_was_measured_of_an_upright_image_is_not_taken_for_a_flat_one() -> None:
    costs = CostTable([StepCost(64, 128, 1, 0.5), StepCost(128, 64, 1, 2.0)])
    queue = make(FakeWorker(costs=costs))
    flat, upright = *enter(queue, height=64, width=128), *enter(queue, height=128, width=64)
    assert (queue._assignment.seconds(flat), queue._assignment.seconds(upright)) == (1.0, 4.0)


async def test_who_starts_over_has_all_of_its_steps_before_it_and_has_begun_nothing() -> None:
    worker = FakeWorker()
    queue = make(worker)
    (place,) = enter(queue)
    place.started, place.steps_done = True, {0: 1}
    queue.lose(place, reached=True)
    queue.rejoin(place)
    assert queue._assignment.seconds(place) == 1.0
    assert place.worker is worker  # type: ignore[comparison-overlap]
    queue.lose(place, reached=None)
    assert (place.strikes, place.doubts) == (1, 1)


async def test_what_a_worker_has_to_do_is_reckoned_with_its_own_costs() -> None:
    slow = FakeWorker("slow", costs=CostTable([StepCost(64, 64, 1, 1.0)]))
    fast = FakeWorker("fast")
    queue = make(slow, fast, max_batch_size=2)
    places = enter(queue, 4)
    assert [p.worker for p in places] == [fast, slow, fast, fast]  # type: ignore[comparison-overlap]


async def test_a_request_that_loses_two_workers_once_begun_is_poison() -> None:
    queue, metrics = make(*(FakeWorker(breaks_after=1) for _ in range(3))), Metrics()
    with pytest.raises(PoisonRequestError):
        await serve(queue, metrics=metrics)
    assert queue.running == queue.waiting == 0
    counted = (f"zserve_{what}_total" for what in ("request_retries", "poison_requests"))
    assert [metrics.registry.get_sample_value(name, {"model": "demo"}) for name in counted] == [1.0, 1.0]


@pytest.mark.parametrize("max_retries", [1, 3])
async def test_a_worker_that_the_server_stops_is_no_strike_and_no_attempt(max_retries: int) -> None:
    last = StoppedWorker("last")
    queue = make(FakeWorker(breaks_after=1), last)
    serving = asyncio.create_task(serve(queue, max_retries))
    await last.begun.wait()
    queue.close(ShuttingDownError("bye"))
    last.stop.set()
    with pytest.raises(ShuttingDownError, match="bye"):
        await serving
    assert queue.running == queue.waiting == 0


async def test_losing_workers_in_company_before_it_began_is_not_its_fault_but_ends_too() -> None:
    queue = make(*(FakeWorker(breaks_after=0) for _ in range(4)))
    enter(queue, 4)  # one for each
    with pytest.raises(WorkerLostError) as failure:
        await serve(queue, max_retries=1)
    assert failure.value.retry_after == 1.0
    assert sum(bool(w.served) for w in queue.workers) == 2  # type: ignore[attr-defined]


class Reader(FakeWorker):
    """Ends, with all that it has, when it reads a request of priority 5; begins with others when it has read them all.

    `next` are the processes that take its place.
    """

    def __init__(self, *, tells: bool, after: "Reader | None" = None) -> None:
        state = WorkerState.READY if after is None else WorkerState.RESTARTING
        super().__init__(state=state)
        self.tells = tells  # that requests have reached it
        self.ended = asyncio.Event()
        self.next: Reader | None = None
        if after is not None:
            after.next = self

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        await asyncio.sleep(0)  # all that it is given are there before it reads the first
        if request.priority == 5:
            self.state = WorkerState.RESTARTING
            self.ended.set()
            if self.next is not None:
                self.next.state = WorkerState.READY
        with suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), 0.05)
            raise WorkerLostError("gone", reached=self.tells or None)
        async for event in super().generate(request):
            yield event


@pytest.mark.parametrize("tells", [True, False])
async def test_a_request_that_ends_workers_as_they_read_it_is_found_and_nobody_fails_with_it(tells: bool) -> None:
    workers = [Reader(tells=tells)]
    for _ in range(9):
        workers.append(Reader(tells=tells, after=workers[-1]))
    queue = make(*workers, max_batch_size=2, queue=QueuePolicy(levels=5))
    good = [serve(queue, priority=level) for level in (3, 3, 3)]
    bad = serve(queue, priority=5)
    refused, *answered = await asyncio.gather(bad, *good, return_exceptions=True)
    assert isinstance(refused, PoisonRequestError)
    assert [isinstance(events, list) and isinstance(events[-1], Completed) for events in answered] == [True] * 3
    assert [worker.ended.is_set() for worker in workers] == [True] * 4 + [False] * 6, "twice in company, twice alone"
    assert queue.running == queue.waiting == 0


class Gone(FakeWorker):
    """Has ended, which is noticed when it is given a request; `reached`: whether by then it had read it."""

    def __init__(self, *, reached: bool | None) -> None:
        super().__init__()
        self.reached = reached

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.state = WorkerState.RESTARTING
        raise WorkerLostError("nobody is there", reached=self.reached)
        yield


@pytest.mark.parametrize("reached", [False, None])
async def test_who_comes_upon_workers_that_have_ended_is_not_to_blame(reached: bool | None) -> None:
    """Nor is it where that is not known, for as long as there are attempts left."""
    events = await serve(make(Gone(reached=reached), Gone(reached=reached), FakeWorker()))
    assert [e.attempt for e in events if isinstance(e, Started)] == [3]


async def test_a_suspect_gets_a_worker_for_itself() -> None:
    first, second = FakeWorker("a"), FakeWorker("b")
    queue = make(first, second)
    places = enter(queue, 4)
    suspect = next(p for p in places if p.worker is first)  # type: ignore[comparison-overlap]
    suspect.started = True
    first.state = WorkerState.RESTARTING
    queue.lose(suspect, reached=True)
    queue.rejoin(suspect)
    others = [p for p in places if p.worker is second]  # type: ignore[comparison-overlap]
    assert suspect.worker is None
    (newcomer,) = enter(queue)
    for place in others:
        queue.leave(place)
        assert newcomer.worker is None, "or the worker might never be free for the suspect"
    assert suspect.worker is second  # type: ignore[comparison-overlap]


async def test_a_suspect_that_waits_keeps_one_worker_from_the_others_and_not_all() -> None:
    queue = make(FakeWorker("a"), FakeWorker("b"))
    held = enter(queue, 2)  # one for each
    (suspect,) = enter(queue)
    suspect.strikes = 1
    queue.lose(suspect, reached=False)
    queue.rejoin(suspect)
    (newcomer,) = enter(queue)
    assert suspect.worker is None
    assert newcomer.worker is not None
    (last,) = (place for place in held if place.worker is not newcomer.worker)
    worker = last.worker
    queue.leave(last)
    assert suspect.worker is worker


async def test_who_came_in_company_is_not_to_blame_for_a_worker_that_was_lost() -> None:
    worker = FakeWorker()
    queue = make(worker)
    places = enter(queue, 2)
    worker.state = WorkerState.RESTARTING
    for place in reversed(places):
        queue.lose(place, reached=True)
        assert (place.losses, place.strikes) == (1, 0)


async def test_a_closed_queue_refuses_whoever_waits() -> None:
    queue = make(FakeWorker())
    enter(queue, 2)
    waiting = asyncio.create_task(serve(queue))
    await asyncio.sleep(0)
    queue.close(ShuttingDownError("bye"))
    queue.close(ModelNotReadyError("too late to say so"))
    with pytest.raises(ZServeError, match="bye"):
        await waiting
    with pytest.raises(ZServeError, match="bye"):
        queue.enter(a_request())


async def until_empty(queue: ModelQueue) -> None:
    async with asyncio.timeout(10):
        while queue.running + queue.waiting:  # noqa: ASYNC110 - the queue tells nobody
            await asyncio.sleep(0)


async def test_a_place_is_given_back_when_its_worker_is_done_though_nobody_reads() -> None:
    worker = FakeWorker()
    queue = make(worker)
    slow = Serving(queue, a_request(), max_retries=3, metrics=Metrics()).events()
    assert isinstance(await anext(slow), Started)
    await until_empty(queue)
    assert isinstance([event async for event in slow][-1], Completed)


async def test_a_request_nobody_reads_of_is_answered_too_when_its_turn_comes() -> None:
    queue = make(FakeWorker())
    first, second = enter(queue, 2)
    slow = Serving(queue, a_request(), max_retries=3, metrics=Metrics()).events()
    assert isinstance(await anext(slow), Queued)
    queue.leave(first)
    queue.leave(second)
    await until_empty(queue)
    assert isinstance([event async for event in slow][-1], Completed)


async def test_of_positions_nobody_has_taken_the_last_is_told() -> None:
    queue = make(FakeWorker())
    places = enter(queue, 4)
    late = Serving(queue, a_request(), max_retries=3, metrics=Metrics()).events()
    assert await anext(late) == Queued(4, 4000.0)
    for place in places[2:]:
        queue.leave(place)
        queue._tell_all()
        await asyncio.sleep(0)  # it hears of each
    assert await anext(late) == Queued(2, 2000.0)
    await late.aclose()
    assert queue.waiting == 0


@pytest.mark.parametrize("begun", [False, True])
async def test_who_stops_reading_for_good_gives_the_place_and_the_worker_back(begun: bool) -> None:
    queue = make(StuckWorker())
    slow = Serving(queue, a_request(), max_retries=3, metrics=Metrics()).events()
    reading = asyncio.ensure_future(anext(slow))
    await asyncio.sleep(0)  # it has asked, and nothing else has run yet
    if begun:
        assert isinstance(await reading, Started)
        assert queue.running == 1
        await slow.aclose()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await asyncio.sleep(0)
    assert queue.running == queue.waiting == 0
    assert queue.workers[0].closed  # type: ignore[attr-defined]


@pytest.mark.parametrize("turns_of_the_loop", range(6))
async def test_who_stops_reading_at_the_moment_that_a_worker_is_free_does_not_keep_it(turns_of_the_loop: int) -> None:
    queue = make(StuckWorker(), queue=QueuePolicy(default=LevelPolicy(timeout=1e6)))
    first, _ = enter(queue, 2)
    slow = Serving(queue, a_request(), max_retries=3, metrics=Metrics()).events()
    assert isinstance(await anext(slow), Queued)
    queue.leave(first)
    for _ in range(turns_of_the_loop):
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await slow.aclose()
    assert (queue.running, queue.waiting) == (1, 0)
