"""The load of the serving benchmarks: who asks for what, when, and how it went."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.record import percentiles

Size = tuple[int, int]  # width and height in pixels
Clients = Mapping[str, tuple[float, int, float | None]]

# Three kinds of client: their share of the requests, their priority, and the time after which an answer is worth
# nothing, in units of one large image so that it means the same on every machine.
CLIENTS: Clients = {"interactive": (0.1, 1, 8.0), "standard": (0.7, 4, 40.0), "batch": (0.2, 7, None)}


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, of which kind and size, and for how many seconds an answer counts."""

    at: float
    kind: str
    size: Size
    priority: int
    patience: float | None


@dataclass(frozen=True)
class Outcome:
    """How one request ended; latency is None where it was refused, dropped or given up."""

    arrival: Arrival
    latency: float | None

    @property
    def good(self) -> bool:
        """Whether it was answered while the answer counted."""
        patience = self.arrival.patience
        return self.latency is not None and (patience is None or self.latency <= patience)


@dataclass(frozen=True)
class Mix:
    """Who asks, and for what: sizes and kinds of client by their share, and the seconds of a unit of patience."""

    sizes: Mapping[Size, float]
    unit: float
    clients: Clients = field(default_factory=lambda: CLIENTS)


def poisson(rate: float, seconds: float, mix: Mix, *, seed: int) -> Iterator[Arrival]:
    """Arrivals at `rate` a second, independent of how the server fares: an open loop."""
    rng = random.Random(seed)
    at = rng.expovariate(rate)
    while at < seconds:
        kind = rng.choices(list(mix.clients), [share for share, _, _ in mix.clients.values()])[0]
        (size,) = rng.choices(list(mix.sizes), list(mix.sizes.values()))
        _, priority, units = mix.clients[kind]
        yield Arrival(at, kind, size, priority, None if units is None else units * mix.unit)
        at += rng.expovariate(rate)


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Rates a second, and latencies in milliseconds, over all and by kind of client."""
    answered = [o for o in outcomes if o.latency is not None]
    # What was still waiting when the last one came takes time too.
    seconds = max([seconds, *(o.arrival.at + (o.latency or 0.0) for o in answered)])
    kinds = dict.fromkeys(o.arrival.kind for o in outcomes)
    return {
        "requests": len(outcomes),
        "seconds": seconds,
        "throughput": len(answered) / seconds,
        "goodput": sum(o.good for o in outcomes) / seconds,
        "latency_ms": _latency(answered),
        "by_kind": {kind: _kind([o for o in outcomes if o.arrival.kind == kind]) for kind in kinds},
    }


def _kind(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    answered = [o for o in outcomes if o.latency is not None]
    good = sum(o.good for o in outcomes) / len(outcomes)
    return {"good": good, "latency_ms": _latency(answered)}


def _latency(answered: Sequence[Outcome]) -> dict[str, float] | None:
    return percentiles([1e3 * (o.latency or 0.0) for o in answered]) if answered else None
