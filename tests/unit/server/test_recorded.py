"""Which calls are recorded and replayed, which run plainly, and that each gets its own result."""

import logging

import pytest
import torch
from torch import Tensor

from server.engines.recorded import RecordedCalls
from tests.fakes import FakeRecorder


class Plain:
    """Adds two tensors, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self.calls += 1
        return a + b


def calls_of(calls: RecordedCalls, size: int, *, times: int = 1) -> None:
    for _ in range(times):
        calls(torch.ones(size), torch.ones(size))


def test_the_first_call_of_a_shape_runs_plainly_the_second_is_recorded_and_all_others_replayed() -> None:
    plain, recorder = Plain(), FakeRecorder()
    calls = RecordedCalls(plain, recorder)
    calls_of(calls, 3)
    assert (plain.calls, len(recorder.graphs)) == (1, 0)
    calls_of(calls, 3)
    assert [graph.replays for graph in recorder.graphs] == [1], "recording does not do the work"
    calls_of(calls, 3, times=5)
    assert [graph.replays for graph in recorder.graphs] == [6]


def test_shapes_and_inputs_may_alternate() -> None:
    calls = RecordedCalls(Plain(), FakeRecorder())
    for value in range(5):
        for size in (2, 3, 4):
            got = calls(torch.full((size,), float(value)), torch.arange(size, dtype=torch.float32))
            assert got.tolist() == [value + i for i in range(size)]


def test_a_result_outlives_the_next_call() -> None:
    calls = RecordedCalls(Plain(), FakeRecorder())
    results = [calls(torch.tensor([float(i)]), torch.zeros(1)) for i in range(5)]
    assert [result.item() for result in results] == [0, 1, 2, 3, 4]


def test_inputs_are_read_where_they_are_copied_to() -> None:
    """A caller's tensor may be gone, or changed, by the time that a graph is replayed."""
    calls = RecordedCalls(Plain(), FakeRecorder())
    transposed = torch.arange(6.0).view(2, 3).t()
    for _ in range(2):
        assert torch.equal(calls(transposed, transposed), 2 * transposed)
    transposed.fill_(7)
    assert calls(torch.ones(3, 2), torch.ones(3, 2)).unique().item() == 2


def test_all_recordings_share_their_memory_with_one_that_lives() -> None:
    recorder = FakeRecorder()
    calls = RecordedCalls(Plain(), recorder, most=2)
    for size in (1, 2, 3, 4):
        calls_of(calls, size, times=2)
    assert recorder.beside[0] is None
    assert all(beside is not None for beside in recorder.beside[1:])
    assert recorder.beside[3] in recorder.graphs[1:3], "the first has been forgotten"


def test_the_shapes_used_last_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    recorder = FakeRecorder()
    calls = RecordedCalls(Plain(), recorder, most=2)
    for size in (1, 2):
        calls_of(calls, size, times=2)
    calls_of(calls, 1)
    calls_of(calls, 3, times=2)  # 2 is forgotten
    calls_of(calls, 1)
    assert [graph.replays for graph in recorder.graphs] == [3, 1, 1]
    calls_of(calls, 2, times=2)  # as at first: plainly, then recorded
    assert [graph.replays for graph in recorder.graphs] == [3, 1, 1, 1]
    assert [r.getMessage()[:26] for r in caplog.records] == ["over 2 shapes are in use, "], "once"


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("full"), RuntimeError("stream capture invalidated")])
def test_a_shape_that_cannot_be_recorded_runs_plainly_and_says_so_once(
    fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = FakeRecorder(fault)
    calls = RecordedCalls(Plain(), recorder)
    with caplog.at_level(logging.WARNING):
        for value in range(4):
            assert calls(torch.tensor([float(value)]), torch.zeros(1)).item() == value
    assert [r.getMessage() for r in caplog.records] == [
        f"calls with inputs of shape [1], [1] are not recorded as a CUDA graph: {fault}"
    ]
    recorder.fault = None
    calls_of(calls, 2, times=3)
    assert [graph.replays for graph in recorder.graphs] == [2], "another shape"


def test_a_call_that_fails_plainly_fails() -> None:
    def full(a: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    calls = RecordedCalls(full, FakeRecorder())
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            calls(torch.zeros(1))


def test_nothing_is_recorded_once_memory_has_run_out() -> None:
    plain, recorder = Plain(), FakeRecorder()
    calls = RecordedCalls(plain, recorder)
    calls_of(calls, 1, times=3)
    calls.stop()
    before = plain.calls
    for size in (1, 2):
        calls_of(calls, size, times=3)
    assert plain.calls == before + 6
    assert len(recorder.graphs) == 1
