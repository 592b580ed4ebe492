"""Lanes: at once on a CPU; on CUDA, by fakes of torch's streams, in the right order and without waiting."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from export.spec import Component
from server.worker.lanes import CudaLane, Lane, Pending, lanes, together


class FakeCuda:
    """What `CudaLane` uses of torch.cuda; writes down what is done, and marks are passed when they are told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.reached = False
        cuda = self

        class Stream:
            def __init__(self, device: torch.device, priority: int) -> None:
                self.name = f"stream {priority}"

            def wait_stream(self, other: str) -> None:
                cuda.done.append(f"{self.name} waits for {other}")

        class Event:
            def record(self, stream: Stream) -> None:
                cuda.done.append(f"mark on {stream.name}")

            def query(self) -> bool:
                return cuda.reached

            def synchronize(self) -> None:
                cuda.done.append("host waits")

        @contextmanager
        def entered(stream: Stream) -> Iterator[None]:
            cuda.done.append(f"enter {stream.name}")
            yield
            cuda.done.append(f"leave {stream.name}")

        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", entered)
        patch.setattr(torch.cuda, "current_stream", lambda device: "the current one")


def test_work_on_cuda_is_begun_on_its_stream_and_asked_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def work():  # type: ignore[no-untyped-def]
        cuda.done.append("work")
        return lambda: "result"

    pending = CudaLane(torch.device("cuda"), priority=-1).start(work)
    begun = ["stream -1 waits for the current one", "enter stream -1", "work", "mark on stream -1", "leave stream -1"]
    assert cuda.done == begun
    assert not pending.done()
    cuda.reached = True
    assert pending.done()
    assert cuda.done == begun, "nobody has waited"
    assert pending.result() == "result"
    assert cuda.done == [*begun, "host waits"]


def test_every_component_has_a_lane_and_steps_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    for component, lane in lanes(torch.device("cuda")).items():
        lane.start(lambda component=component: cuda.done.append(component) or (lambda: None))  # type: ignore[misc]
    assert [d for d in cuda.done if d in list(Component) or d.startswith("mark")] == [
        Component.PROMPT_ENCODER, "mark on stream 0", Component.DENOISER, "mark on stream -1",
        Component.IMAGE_DECODER, "mark on stream 0",
    ]  # fmt: skip
    assert len(set(lanes(torch.device("cuda")).values())) == len(Component)


def test_on_a_cpu_it_is_done_at_once_and_made_once() -> None:
    made: list[str] = []
    (lane,) = set(lanes(torch.device("cpu")).values())
    assert type(lane) is Lane
    pending = lane.start(lambda: lambda: made.append("made"))
    assert pending.done()
    pending.result(), pending.result()
    assert made == ["made"]


def test_several_are_done_when_all_are() -> None:
    class Mark:
        passed = False

        def query(self) -> bool:
            return self.passed

        def synchronize(self) -> None:
            self.passed = True

    first, second = Mark(), Mark()
    results: list[list[str]] = []
    both = together([Pending(lambda: "a", first), Pending(lambda: "b", second)], results.append)
    assert not both.done()
    first.passed = True
    assert not both.done()
    second.passed = True
    assert both.done()
    both.result()
    assert results == [["a", "b"]]
