"""The batcher: who runs together, who waits, who is refused; without a server."""

import asyncio
from dataclasses import replace

import pytest

from server.backends.batcher import Batcher
from server.errors import EngineRunError, ModelNotReadyError, QueueFullError, QueueTimeoutError
from server.queue_policy import LevelPolicy, QueuePolicy, TimeoutAction
from server.rpc.triton.model_config import parse_model_file
from server.statistics import Statistics
from server.tensors import DataType, InferRequest, ModelSpec, Tensor, TensorSpec

GONE = ModelNotReadyError("gone")
PATIENCE = 300.0  # seconds that nothing here takes
SPEC = ModelSpec("m", "1", "identity", (TensorSpec("A", DataType.UINT8, (-1,)),), (), max_batch_size=4)


def a_request(rows: int = 1, name: str = "", priority: int = 0, width: int = 1) -> InferRequest:
    tensor = Tensor("A", DataType.UINT8, (rows, width), b"\0" * rows * width)
    return InferRequest(SPEC, name, {"A": tensor}, priority=priority)


class Runs:
    """Remembers the batches, and holds each of them until it is let go."""

    def __init__(self, policy: QueuePolicy, rows: int = 1) -> None:
        self.batches: list[list[str]] = []
        self.go = asyncio.Event()
        self.statistics = Statistics()
        self.batcher = Batcher(self.execute, self.statistics, policy=policy, max_batch_size=rows, instances=1)

    async def execute(self, requests: list[InferRequest]) -> None:
        self.batches.append([r.id for r in requests])
        await self.go.wait()

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


async def test_without_a_bound_any_number_waits() -> None:
    runs = Runs(parse_model_file("backend: 'identity'", "m").queue)
    tasks = runs.start(*(a_request() for _ in range(300)))
    await asyncio.sleep(0)
    assert runs.statistics.pending == 299
    runs.go.set()
    await asyncio.gather(*tasks)


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
    most = 1000
    runs = Runs(QueuePolicy(levels=most, default_level=most, max_delay=0.02), rows=most)
    runs.go.set()
    tasks: list[asyncio.Task[object]] = []
    while not runs.batches:
        tasks += runs.start(a_request(priority=most - len(tasks) if later_goes_first else 0))
        await asyncio.sleep(0.001)
    assert len(runs.batches[0]) < most
    await asyncio.gather(*tasks)


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
    assert list(runs.statistics.batches) == [3]


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


async def test_a_batch_that_nobody_wants_any_more_is_stopped() -> None:
    runs = Runs(QueuePolicy())
    first, second = runs.start(a_request(name="a"), a_request(name="b"))
    await asyncio.sleep(0)
    for task in (first, second):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
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
