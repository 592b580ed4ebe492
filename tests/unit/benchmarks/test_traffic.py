"""How requests are sent, against clients that are made up."""

import asyncio
from types import SimpleNamespace
from typing import Any, Self

import grpc
import pytest

from benchmarks import traffic
from benchmarks.traffic import Manners, Traffic
from benchmarks.workload import Arrival
from client import GenerationFailedError

TAKES = 0.25  # seconds that the clients' event loop is busy with an answer


class Client:
    """Takes the time of all clients for an answer, on a clock that stands still else."""

    now = 100.0
    timeouts: list[float | None]
    slept: list[float]
    failures: dict[int, grpc.StatusCode]  # by seed

    def __init__(self, url: str, *, timeout: float | None = None) -> None:
        self.timeouts.append(timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def draw(self, prompt: str, *, seed: int, **options: Any) -> SimpleNamespace:
        if seed in self.failures:
            raise GenerationFailedError(self.failures[seed], "a reason")
        type(self).now += TAKES
        return SimpleNamespace(completed=None)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    made = type("Made", (Client,), {"timeouts": [], "slept": [], "failures": {}})

    async def sleep(seconds: float) -> None:
        made.slept.append(seconds)

    monkeypatch.setattr(traffic, "AsyncZImageClient", made)
    monkeypatch.setattr(traffic, "check_answer", lambda *answer: None)
    monkeypatch.setattr(traffic, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(traffic, "asyncio", SimpleNamespace(sleep=sleep, gather=asyncio.gather))
    return made


def arrivals(*times: float) -> list[Arrival]:
    return [Arrival(at, "all", (64, 64), 1, patience=2.0) for at in times]


async def test_latency_counts_from_the_time_planned(client: type[Client]) -> None:
    """Clients that are busy with one answer send the next request late, which the server is not to be spared."""
    outcomes = await Traffic("", "onnxruntime", ["a cat"]).open_loop(arrivals(0.0, 0.0, 0.0), Manners.TELL)
    assert [o.latency for o in outcomes] == [TAKES, 2 * TAKES, 3 * TAKES]
    assert client.timeouts == [2.0, 2.0 - TAKES, 2.0 - 2 * TAKES]


async def test_the_warm_up_comes_first(client: type[Client]) -> None:
    await Traffic("", "onnxruntime", ["a cat"]).open_loop(arrivals(-4.0, 3.0), Manners.WAIT)
    assert client.slept == [0.0, 7.0 - TAKES]
    assert client.timeouts == [None, None]


async def test_what_overload_may_answer_is_noted(client: type[Client]) -> None:
    client.failures = {0: grpc.StatusCode.DEADLINE_EXCEEDED, 2: grpc.StatusCode.RESOURCE_EXHAUSTED}
    outcomes = await Traffic("", "onnxruntime", ["a cat"]).open_loop(arrivals(0.0, 0.0, 0.0), Manners.TELL)
    assert [o.status for o in outcomes] == ["DEADLINE_EXCEEDED", "OK", "RESOURCE_EXHAUSTED"]
    assert [o.latency is None for o in outcomes] == [True, False, True]


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN])
async def test_any_other_failure_ends_the_run(client: type[Client], code: grpc.StatusCode) -> None:
    client.failures = {1: code}
    with pytest.raises(GenerationFailedError, match=f"{code.name}: a reason"):
        await Traffic("", "onnxruntime", ["a cat"]).open_loop(arrivals(0.0, 0.0), Manners.TELL)
