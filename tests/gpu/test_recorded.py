"""On an NVIDIA GPU: recorded calls give what plain ones give, on any stream and after any failure.

Run by `make test-gpu`.
"""

import logging
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from server.engines.recorded import CudaRecorder, RecordedCalls

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
MIB = 1 << 20


class Net:
    """Some kernels with memory between them, and weights that may be changed."""

    def __init__(self) -> None:
        self.weight = torch.randn(64, 64).cuda()
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        for _ in range(4):
            x = torch.tanh(x @ self.weight) + x
        return x


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def net() -> Net:
    return Net()


def recorded(net: Net, most: int = 8) -> RecordedCalls:
    return RecordedCalls(net, CudaRecorder(torch.device("cuda")), most)


def x(rows: int) -> Tensor:
    """Made on the CPU: after a recording that failed, torch 2.11 makes no random numbers on CUDA (nor does zserve)."""
    return torch.randn(rows, 64).cuda()


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def on(stream: torch.cuda.Stream, calls: RecordedCalls, given: Tensor) -> Tensor:
    """A call there, between what the current stream has been given and what it will be."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = calls(given)
    torch.cuda.current_stream().wait_stream(stream)
    return got


@pytest.mark.parametrize("side", [False, True])
def test_shapes_and_inputs_may_alternate(net: Net, side: bool) -> None:
    calls = recorded(net)
    stream = torch.cuda.Stream() if side else torch.cuda.default_stream()
    given = [x(rows) for _ in range(6) for rows in (3, 17, 200)]
    got = [on(stream, calls, one) for one in given]
    assert net.calls == 6, "one plain and one recorded call of each shape"
    for one, result in zip(given, got, strict=True):
        same(result, net(one))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_a_graph_may_be_replayed_on_another_stream(net: Net) -> None:
    calls = recorded(net)
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
    for _ in range(3):
        for stream in streams:
            one = x(5)
            same(on(stream, calls, one), net(one))


def test_changing_a_weight_in_place_changes_what_is_replayed(net: Net) -> None:
    calls, one = recorded(net), x(7)
    for _ in range(3):
        calls(one)
    net.weight.mul_(0.5)
    same(calls(one), net(one))


def test_a_forgotten_shape_is_recorded_again(net: Net) -> None:
    calls = recorded(net, most=2)
    for _ in range(2):
        for rows in (1, 2, 3, 4):
            for _ in range(3):
                one = x(rows)
                same(calls(one), net(one))
    before = net.calls
    calls(x(4)), calls(x(3))
    assert net.calls == before, "the last two are kept"
    calls(x(2))
    assert net.calls == before + 1


def test_no_memory_while_recording_leaves_a_plain_call(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    def greedy(given: Tensor) -> Tensor:
        made = net(given)  # first, for torch warns of a recording without anything in it
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return made

    _fails_and_goes_on(net, RecordedCalls(greedy, CudaRecorder(torch.device("cuda"))), caplog)


def test_what_cannot_be_recorded_is_run_plainly_and_harms_nothing(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    def waits(given: Tensor) -> Tensor:
        return net(given) * given.isfinite().all().item()  # the host waits for the device

    _fails_and_goes_on(net, RecordedCalls(waits, CudaRecorder(torch.device("cuda"))), caplog)


def _fails_and_goes_on(net: Net, calls: RecordedCalls, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            one = x(9)
            same(calls(one), net(one))
    assert len(caplog.records) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    others = recorded(net)
    for _ in range(4):
        one = x(9)
        same(others(one), net(one))


def test_pinned_memory_may_be_freed_while_calls_on_its_stream_are_recorded(net: Net) -> None:
    """As when a thread has encoded an image while a shape is recorded on the stream that the image came by."""
    lane, given = torch.cuda.Stream(), x(9)
    with torch.cuda.stream(lane):
        pixels = [given.to("cpu", non_blocking=True)]
    lane.synchronize()

    def call(given: Tensor) -> Tensor:
        made = net(given)
        if torch.cuda.is_current_stream_capturing():
            freeing = threading.Thread(target=pixels.clear)
            freeing.start()
            freeing.join()
        return made

    calls = RecordedCalls(call, CudaRecorder(torch.device("cuda")))
    for _ in range(3):
        got = on(lane, calls, given)
        with torch.cuda.stream(lane):
            host = got.to("cpu", non_blocking=True)
        lane.synchronize()
        same(host, net(given).cpu())
    assert not pixels


def test_memory_comes_back(net: Net) -> None:
    def large(given: Tensor) -> Tensor:
        return given.expand(256, -1).repeat(1, 4096).add(1).sum(1, keepdim=True)  # 256 MiB twice in between

    # On a stream of its own, as in the server; there cuBLAS keeps what it needs outside the graphs' memory.
    stream = torch.cuda.Stream()
    calls = RecordedCalls(large, CudaRecorder(torch.device("cuda")))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        on(stream, calls, x(1))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before > 128 * MIB, "the graph computes in memory of its own"
    calls.stop()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 16 * MIB
