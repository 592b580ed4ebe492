"""The batcher: who runs together, who waits, who is refused; without a server."""

import asyncio
import gc
import weakref
from dataclasses import replace

import pytest

from server.backends.batcher import Batcher
from server.errors import EngineRunError, ModelNotReadyError, QueueFullError, QueueTimeoutError
from server.queue_policy import LevelPolicy, QueuePolicy, TimeoutAction
from server.rpc.triton.model_config import parse_model_file
from server.statistics import Spent, Statistics
from server.tensors import DataType, InferRequest, ModelSpec, Tensor, TensorSpec

GONE = ModelNotReadyError("gone")
PATIENCE = 300.0  # seconds that nothing here takes
SPEC = ModelSpec("m", "1", "identity", (TensorSpec("A", DataType.UINT8, (-1,)),), (), max_batch_size=4)


def a_request(rows: int = 1, name: str = "", priority: int = 0, width: int = 1) -> InferRequest:
    tensor = Tensor("A", DataType.UINT8, (rows, width), b"\0" * rows * width)
    return InferRequest(SPEC, name, {"A": tensor}, priority=priority)


class Runs:
    """Remembers the batches, and holds each of them until it is let go, or raises `error`."""

    def __init__(self, policy: QueuePolicy, rows: int = 1, instances: int = 1, error: Exception | None = None) -> None:
        self.batches: list[list[str]] = []
        self.go = asyncio.Event()
        self.statistics = Statistics()
        self.error = error
        self.begun = asyncio.Event()
        self.batcher = Batcher(self.execute, self.statistics, policy=policy, max_batch_size=rows, instances=instances)

    async def execute(self, requests: list[InferRequest]) -> None:
        self.batches.append([r.id for r in requests])
        self.begun.set()
        await self.go.wait()
        if self.error is not None:
            raise self.error

    def start(self, *requests: InferRequest) -> list["asyncio.Task[object]"]:
        return [asyncio.ensure_future(self.batcher.run(r)) for r in requests]


async def test_what_waits_together_runs_together_up_to_the_limit() -> None:
    runs = Runs(QueuePolicy(), rows=4)
    tasks = runs.start(*(a_request(name=str(n)) for n in range(6)))
    await asyncio.sleep(0)
    runs.go.set()
    await asyncio.gather(*tasks)
    assert runs.batches == [["0"], ["1", "2", "3", "4"], ["5"]]
    assert sorted(runs.statistics.batches) == [1, 4]


@pytest.mark.parametrize(
    ("preferred", "rows", "sizes"), [((2, 3), 1, [1, 3, 2]), ((4,), 2, [1, 2, 2, 1]), ((2,), 1, [1, 2, 2, 1])]
)
async def test_of_what_waits_the_largest_preferred_number_of_rows_is_taken(
    preferred: tuple[int, ...], rows: int, sizes: list[int]
) -> None:
    runs = Runs(QueuePolicy(preferred_batch_sizes=preferred), rows=8 if rows == 2 else 4)
    tasks = runs.start(*(a_request(rows=rows) for _ in range(sum(sizes))))
    await asyncio.sleep(0)
    runs.go.set()
    await asyncio.gather(*tasks)
    assert list(map(len, runs.batches)) == sizes


async def test_more_rows_than_run_together_run_by_themselves() -> None:
    """As where a model has a `max_batch_size` and no `dynamic_batching`."""
    runs = Runs(QueuePolicy())
    tasks = runs.start(*(a_request(rows=2) for _ in range(3)))
    await asyncio.sleep(0)
    runs.go.set()
    await asyncio.gather(*tasks)
    assert list(map(len, runs.batches)) == [1, 1, 1]


async def test_who_fits_does_not_overtake_who_does_not() -> None:
    runs = Runs(QueuePolicy(), rows=4)
    tasks = runs.start(*(a_request(name=n, width=w) for n, w in (("x", 1), ("a", 1), ("b", 2), ("c", 1))))
    await asyncio.sleep(0)
    runs.go.set()
    await asyncio.gather(*tasks)
    assert runs.batches == [["x"], ["a"], ["b"], ["c"]]


async def test_every_instance_that_is_free_gets_what_waits() -> None:
    """One batch waits for others like it until its delay is over; who comes next is not like it."""
    runs = Runs(QueuePolicy(max_delay=PATIENCE), rows=2, instances=2)
    tasks = runs.start(a_request(name="a"), a_request(rows=2, name="b"))
    async with asyncio.timeout(10):
        while len(runs.batches) < 2:  # noqa: ASYNC110 - none of them ends
            await asyncio.sleep(0)
    assert runs.batches == [["a"], ["b"]]
    runs.go.set()
    await asyncio.gather(*tasks)


async def test_rows_of_different_shapes_do_not_share_a_batch() -> None:
    runs = Runs(QueuePolicy(max_delay=0.001), rows=4)
    runs.go.set()
    await asyncio.gather(*runs.start(a_request(name="a"), a_request(name="b", width=2), a_request(name="c", width=2)))
    assert runs.batches == [["a"], ["b", "c"]]


async def test_rows_of_equal_shapes_share_a_batch_in_whatever_order_their_inputs_are() -> None:
    def named(one: str, other: str) -> InferRequest:
        """The first of the two inputs is one wide, the second two."""
        tensors = (Tensor(name, DataType.UINT8, (1, width), bytes(width)) for name, width in ((one, 1), (other, 2)))
        return InferRequest(SPEC, one + other, {tensor.name: tensor for tensor in tensors})

    same = replace(named("A", "B"), inputs=dict(reversed(named("A", "B").inputs.items())))
    runs = Runs(QueuePolicy(max_delay=0.001), rows=4)
    runs.go.set()
    await asyncio.gather(*runs.start(named("A", "B"), same, named("B", "A")))
    assert runs.batches == [["AB", "AB"], ["BA"]]


async def test_priority_goes_first_then_arrival() -> None:
    runs = Runs(QueuePolicy(levels=3, default_level=2))
    tasks = runs.start(*(a_request(name=n, priority=p) for n, p in (("x", 0), ("low", 3), ("none", 0), ("high", 1))))
    await asyncio.sleep(0)
    runs.go.set()
    await asyncio.gather(*tasks)
    assert [b[0] for b in runs.batches] == ["x", "high", "none", "low"]


async def test_the_highest_priority_goes_first_where_no_levels_are_configured() -> None:
    """And a level that there is not, however large, is the default one: as in Triton."""
    runs = Runs(parse_model_file("", "m").queue)
    wanted = (("x", 0), ("none", 0), ("beyond", 2**40), ("high", 1))
    tasks = runs.start(*(a_request(name=n, priority=p) for n, p in wanted))
    await asyncio.sleep(0)
    runs.go.set()
    await asyncio.gather(*tasks)
    assert [b[0] for b in runs.batches] == ["x", "high", "none", "beyond"]


async def test_a_late_request_may_be_put_behind_the_others_of_its_level_instead() -> None:
    late = LevelPolicy(on_timeout=TimeoutAction.DELAY, request_may_set_timeout=True)
    runs = Runs(QueuePolicy(levels=2, default_level=1, default=late))
    requests = [a_request(name="x"), a_request(name="late"), a_request(name="next"), a_request(name="low", priority=2)]
    requests[1] = replace(requests[1], queue_timeout=0.001)
    tasks = runs.start(*requests)
    await asyncio.sleep(0)  # they wait now, and timers go off in the order of their times
    await asyncio.sleep(0.001)
    runs.go.set()
    await asyncio.gather(*tasks)
    assert [b[0] for b in runs.batches] == ["x", "next", "late", "low"]


async def test_every_level_has_a_queue_of_its_own() -> None:
    runs = Runs(QueuePolicy(levels=2, default_level=1, by_level=((2, LevelPolicy(max_size=1)),)))
    tasks = runs.start(a_request(), *(a_request(priority=1) for _ in range(3)), a_request(priority=2))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="max_queue_size 1 of"):
        await runs.batcher.run(a_request(priority=2))
    assert runs.statistics.pending == 4
    runs.go.set()
    await asyncio.gather(*tasks)
    assert runs.statistics.pending == 0


async def test_every_level_has_a_timeout_of_its_own_and_its_own_way_with_who_is_late() -> None:
    late = LevelPolicy(timeout=0.001)
    delaying = replace(late, on_timeout=TimeoutAction.DELAY)
    runs = Runs(QueuePolicy(levels=3, default_level=1, by_level=((2, late), (3, delaying))))
    running, patient, refused, delayed, other = runs.start(*(a_request(priority=level) for level in (1, 1, 2, 3, 3)))
    async with asyncio.timeout(10):
        with pytest.raises(QueueTimeoutError):
            await refused
        while not all(place.delayed for place in runs.batcher._waiting if place.priority == 3):  # noqa: ASYNC110
            await asyncio.sleep(0)
    runs.go.set()
    await asyncio.gather(running, patient, delayed, other)
    assert len(runs.batches) == 4


async def test_without_a_bound_any_number_waits() -> None:
    runs = Runs(parse_model_file("backend: 'identity'", "m").queue)
    tasks = runs.start(*(a_request() for _ in range(300)))
    await asyncio.sleep(0)
    assert runs.statistics.pending == 299
    runs.go.set()
    await asyncio.gather(*tasks)


async def test_a_request_that_has_run_is_not_looked_for_among_those_that_wait() -> None:
    """On the event loop it would take longer than to answer it, where thousands wait."""
    compared, count = 0, 500

    class Level(int):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return int(self) == other

        __hash__ = int.__hash__

    runs = Runs(QueuePolicy(default=LevelPolicy(max_size=None)))
    tasks = runs.start(*(a_request(priority=Level(1)) for _ in range(count)))
    await asyncio.sleep(0)
    assert runs.statistics.pending == count - 1
    runs.go.set()
    await asyncio.gather(*tasks)
    assert compared < 30 * count


async def test_closing_ends_what_is_executed_and_what_waits_and_what_comes() -> None:
    runs = Runs(QueuePolicy(), rows=2)
    first, *others = runs.start(*(a_request() for _ in range(4)))
    await asyncio.sleep(0)
    let_go, runs.go = runs.go, asyncio.Event()
    let_go.set()
    await first
    assert list(map(len, runs.batches)) == [1, 2]
    runs.batcher.close(GONE)
    late = runs.start(a_request())
    assert await asyncio.gather(*others, *late, return_exceptions=True) == [GONE] * 4
    assert runs.statistics.pending == 0


@pytest.mark.parametrize(("delay", "begun"), [(0.0, 1), (1.0, 0)], ids=["by itself", "not begun"])
async def test_closing_ends_a_batch_of_one(delay: float, begun: int) -> None:
    runs = Runs(QueuePolicy(max_delay=delay))
    (task,) = runs.start(a_request())
    await asyncio.sleep(0)
    runs.batcher.close(GONE)
    assert await asyncio.gather(task, return_exceptions=True) == [GONE]
    assert len(runs.batches) == begun


@pytest.mark.parametrize("later_goes_first", [False, True])
async def test_arrivals_do_not_put_off_a_batch_that_waits_for_them(later_goes_first: bool) -> None:
    """It is counted from the first that came, wherever in the batch that is."""
    runs = Runs(QueuePolicy(levels=2, default_level=2, max_delay=PATIENCE), rows=3)
    runs.go.set()
    tasks = runs.start(a_request(name="early"))
    await asyncio.sleep(0)
    (place,) = runs.batcher._waiting
    place.arrived -= PATIENCE
    tasks += runs.start(a_request(name="late", priority=1 if later_goes_first else 2))
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks)
    assert runs.batches == [["late", "early"] if later_goes_first else ["early", "late"]]


async def test_a_preferred_size_is_not_waited_beyond() -> None:
    runs = Runs(QueuePolicy(max_delay=PATIENCE, preferred_batch_sizes=(2,)), rows=4)
    runs.go.set()
    await asyncio.gather(*runs.start(*(a_request(name=str(n)) for n in range(4))))
    assert runs.batches == [["0", "1"], ["2", "3"]]


@pytest.mark.parametrize(
    "misfit", [a_request(rows=2, name="c"), a_request(name="c", width=2)], ids=["too many rows", "another shape"]
)
async def test_a_batch_is_not_held_when_what_is_next_does_not_fit(misfit: InferRequest) -> None:
    runs = Runs(QueuePolicy(max_delay=PATIENCE), rows=4)
    runs.go.set()
    *fitting, waiting = runs.start(a_request(rows=2, name="a"), a_request(name="b"), misfit)
    await asyncio.gather(*fitting)
    assert runs.batches == [["a", "b"]]
    waiting.cancel()


async def test_a_batch_is_counted_by_its_rows_and_each_request_by_its_own_wait() -> None:
    runs = Runs(QueuePolicy(max_delay=PATIENCE), rows=3)
    runs.go.set()
    early = asyncio.create_task(runs.batcher.run(a_request(rows=2)))
    await asyncio.sleep(0)
    late = await runs.batcher.run(a_request())
    assert (await early).queue > late.queue > 0
    assert (await early).compute_infer == late.compute_infer > 0
    assert list(runs.statistics.batches) == [3]


@pytest.mark.parametrize("error", [None, EngineRunError("boom")])
async def test_who_leaves_a_batch_does_not_take_the_others_answer_along(error: EngineRunError | None) -> None:
    runs = Runs(QueuePolicy(max_delay=PATIENCE), rows=2, error=error)
    leaving, staying = runs.start(a_request(name="a"), a_request(name="b"))
    await runs.begun.wait()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await asyncio.sleep(0)
    runs.go.set()
    async with asyncio.timeout(10):
        (end,) = await asyncio.gather(staying, return_exceptions=True)
    assert end is error if error else isinstance(end, Spent)
    assert runs.batches == [["a", "b"]]


async def test_all_who_share_a_batch_that_fails_are_answered() -> None:
    async def fail(requests: list[InferRequest]) -> None:
        raise EngineRunError("boom")

    policy = QueuePolicy(max_delay=PATIENCE)
    batcher = Batcher(fail, Statistics(), policy=policy, max_batch_size=2, instances=1)
    async with asyncio.timeout(10):
        ends = await asyncio.gather(*(batcher.run(a_request()) for _ in range(2)), return_exceptions=True)
    assert [str(end) for end in ends] == ["boom", "boom"]


async def test_a_full_queue_refuses() -> None:
    runs = Runs(QueuePolicy(default=LevelPolicy(max_size=1)))
    started = runs.start(a_request(), a_request())
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await runs.batcher.run(a_request())
    runs.go.set()
    await asyncio.gather(*started)


async def test_a_late_request_is_refused() -> None:
    runs = Runs(QueuePolicy(default=LevelPolicy(timeout=0.001)))
    running, waiting = runs.start(a_request(), a_request())
    with pytest.raises(QueueTimeoutError, match=r"^Request timeout expired$"):
        await waiting
    runs.go.set()
    await running


async def test_a_request_that_is_cancelled_as_its_time_is_up_is_cancelled() -> None:
    runs = Runs(QueuePolicy(default=LevelPolicy(timeout=PATIENCE)))
    running, waiting = runs.start(a_request(), a_request())
    await asyncio.sleep(0)
    (place,) = runs.batcher._waiting
    waiting.cancel()
    runs.batcher._expire(place)  # in the same turn of the event loop, before the task goes on
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert runs.statistics.pending == 0
    runs.go.set()
    await running


@pytest.mark.parametrize("answered", [True, False])
async def test_closing_ends_requests_and_not_what_their_callers_then_do(answered: bool) -> None:
    runs, go_on = Runs(QueuePolicy()), asyncio.Event()

    async def call() -> int:
        if answered:
            await runs.batcher.run(a_request())
        else:
            with pytest.raises(ModelNotReadyError):
                await runs.batcher.run(a_request())
        await go_on.wait()
        return asyncio.current_task().cancelling()  # type: ignore[union-attr]

    if answered:
        runs.go.set()
    caller = asyncio.create_task(call())
    await asyncio.sleep(0)
    runs.batcher.close(GONE)
    go_on.set()
    assert await caller == 0


async def test_a_request_that_is_cancelled_as_the_model_closes_does_not_keep_the_others_waiting() -> None:
    runs = Runs(QueuePolicy())
    running, cancelled, waiting = runs.start(*(a_request() for _ in range(3)))
    await asyncio.sleep(0)
    cancelled.cancel()
    runs.batcher.close(GONE)  # in the same turn of the event loop, before the task goes on
    ends = await asyncio.gather(running, cancelled, waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [ModelNotReadyError, asyncio.CancelledError, ModelNotReadyError]
    assert runs.statistics.pending == 0


async def test_who_comes_after_the_end_does_not_wait_for_what_cannot_be_stopped() -> None:
    go = asyncio.Event()

    async def persist(requests: list[InferRequest]) -> None:
        try:
            await go.wait()
        except asyncio.CancelledError:
            await go.wait()
            raise

    batcher = Batcher(persist, Statistics(), policy=QueuePolicy(), max_batch_size=1, instances=1)
    running = asyncio.create_task(batcher.run(a_request()))
    await asyncio.sleep(0)
    batcher.close(GONE)
    with pytest.raises(ModelNotReadyError):
        await asyncio.wait_for(batcher.run(a_request()), 10)
    assert not running.done()
    go.set()
    assert await asyncio.gather(running, return_exceptions=True) == [GONE]


async def test_a_request_that_runs_is_not_late_any_more() -> None:
    runs = Runs(QueuePolicy(default=LevelPolicy(timeout=PATIENCE)), instances=1)
    first, second = runs.start(a_request(name="a"), a_request(name="b"))
    await asyncio.sleep(0)
    (place,) = runs.batcher._waiting
    let_go, runs.go = runs.go, asyncio.Event()
    let_go.set()
    await first
    while len(runs.batches) < 2:  # noqa: ASYNC110 - it is a matter of turns of the event loop
        await asyncio.sleep(0)
    runs.batcher._expire(place)
    runs.go.set()
    await second
    assert runs.batches == [["a"], ["b"]]


async def test_an_answered_request_is_not_kept_until_its_time_would_have_been_up() -> None:
    runs = Runs(QueuePolicy(default=LevelPolicy(timeout=PATIENCE)))
    request = a_request()
    kept = weakref.ref(request)
    tasks = runs.start(a_request(), request)
    await asyncio.sleep(0)
    assert [place.request for place in runs.batcher._waiting] == [request]
    runs.go.set()
    await asyncio.gather(*tasks)
    del request, tasks
    gc.collect()
    assert kept() is None


async def test_a_batch_that_nobody_wants_any_more_is_stopped() -> None:
    runs = Runs(QueuePolicy())
    first, second = runs.start(a_request(name="a"), a_request(name="b"))
    await asyncio.sleep(0)
    for task in (first, second):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        await asyncio.sleep(0)
    (third,) = runs.start(a_request(name="c"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert runs.batches == [["a"], ["b"], ["c"]]
    runs.go.set()
    await third


async def test_a_cancelled_request_leaves_its_place() -> None:
    runs = Runs(QueuePolicy(default=LevelPolicy(max_size=1)))
    running, waiting = runs.start(a_request(name="a"), a_request(name="b"))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    (third,) = runs.start(a_request(name="c"))
    runs.go.set()
    await asyncio.gather(running, third)
    assert runs.batches == [["a"], ["c"]]
