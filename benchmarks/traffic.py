"""Sends the requests of `benchmarks.workload` to a server, and notes how each went."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import grpc

from benchmarks.record import BenchmarkError
from benchmarks.workload import Arrival, Outcome, Size
from client import AsyncZImageClient, GenerationFailedError
from client.messages import ImageRequest
from protos.zserve.v1 import image_generation_pb2 as pb

# What an overloaded server may answer. Not UNAVAILABLE: a request that passes its queue timeout gets it too, but no
# model of a benchmark has one, and otherwise it means that a worker or a server is gone.
TOO_MUCH = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}


class Manners(Enum):
    """What clients tell the server about themselves."""

    TELL = "priority and deadline"
    WAIT = "nothing: they wait, and an answer past their patience is not good"


@dataclass(frozen=True)
class Traffic:
    """Clients of one server, which check which engine answers them; each request takes the next of the prompts."""

    url: str
    backend: str
    prompts: Sequence[str]
    steps: int = 8
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def closed_loop(self, clients: int, seconds: float, sizes: Sequence[Size]) -> list[Outcome]:
        """Runs `clients` clients, each of which asks again when it has its answer."""
        outcomes: list[Outcome] = []
        began = time.monotonic()

        async def one(number: int) -> None:
            at = 0.0
            while at < seconds:
                arrival = Arrival(at, "closed", sizes[number % len(sizes)], 0, None)
                await self._ask(client, arrival.size, 0)
                now = time.monotonic() - began
                outcomes.append(Outcome(arrival, now - at))
                at = now

        async with AsyncZImageClient(self.url) as client:
            await asyncio.gather(*(one(number) for number in range(clients)))
        return outcomes

    async def open_loop(self, arrivals: Sequence[Arrival], manners: Manners) -> list[Outcome]:
        """Sends every request at its time, whatever has become of those before; `arrivals` are in order of time.

        Raises:
            GenerationFailedError: the server failed for a reason other than overload.
        """
        began = time.monotonic() - min(0.0, arrivals[0].at)
        tell = manners is Manners.TELL

        async def one(arrival: Arrival) -> Outcome:
            planned = began + arrival.at
            await asyncio.sleep(planned - time.monotonic())
            # A late request has waited that long already; one with no time left is sent all the same.
            left = None if arrival.patience is None else max(1e-6, planned + arrival.patience - time.monotonic())
            async with AsyncZImageClient(self.url, timeout=left if tell else None) as client:
                try:
                    await self._ask(client, arrival.size, arrival.priority if tell else 0)
                except GenerationFailedError as error:
                    if error.code not in TOO_MUCH:
                        raise
                    return Outcome(arrival, None, error.code.name)
            return Outcome(arrival, time.monotonic() - planned)

        return await asyncio.gather(*(one(arrival) for arrival in arrivals))

    async def _ask(self, client: AsyncZImageClient, size: Size, priority: int) -> None:
        number = next(self.numbers)
        prompt = self.prompts[number % len(self.prompts)]
        request = ImageRequest(
            prompt, width=size[0], height=size[1], seed=number, priority=priority,
            image_format="raw", num_inference_steps=self.steps,
        )  # fmt: skip
        drawing = await client.draw(**vars(request))
        check_answer(drawing.completed, self.backend, self.steps)


def check_answer(completed: pb.Completed, backend: str, forwards: int) -> None:
    """Raises `BenchmarkError` if another engine answered, or the denoiser did not run `forwards` times."""
    check_engines(completed, backend)
    if completed.denoiser_forwards != forwards:
        raise BenchmarkError(f"the denoiser ran {completed.denoiser_forwards} times, and {forwards} were asked for")


def check_engines(completed: pb.Completed, backend: str) -> None:
    """Raises `BenchmarkError` if another engine answered."""
    others = [e for e in completed.engines if e.fallback_reason or e.backend != backend]
    if others or not completed.engines:
        raise BenchmarkError(f"{backend} is to be measured, and others answered: {others}")
