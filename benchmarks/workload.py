"""The workload of the serving benchmarks: who asks for what, when, and how it went.

Closed loop: every request counts, and rates are over the time until the last answer, as there is work until then.

Open loop: a warm-up, twice as long as the longest patience, then a window of the seconds asked for. `poisson` draws the
arrivals of both, and `open_summary` counts as follows.

* Latency is from the planned time of a request, as in MLPerf's LoadGen (its `scheduled_time`), so the clients' own
  lateness counts too. Percentiles are of all requests that came in the window. One without an answer counts as slower
  than any that has one, so a percentile that falls among those is None: over every deadline.
* `throughput` and `goodput` are the answers, and the answers in time, given within the window, over its seconds; the
  latter is completed requests a second that meet their objective, as DistServe and AIPerf define it. What is answered
  after the window, within `drain_seconds`, does not count, and answers in it to earlier requests do, as in any part of
  a longer run: otherwise a queue that is yet to form, or still to be worked off, would make an overload look better or
  worse than it is.
* `requests` are also of the window: how many came, were answered, and were answered in time, whenever that was.
  `statuses`: the gRPC statuses they ended with.
"""

import argparse
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.record import PERCENTS, percentiles

Size = tuple[int, int]  # width and height in pixels
Clients = Mapping[str, tuple[float, int, float | None]]

# Part of a record's settings: figures of another method are not comparable, and `zserve bench compare` says so.
METHOD = {"open_loop": "in a window after a warm-up; latency of all requests, from the time planned"}

# Three kinds of client: their share of the requests, their priority, and the time after which an answer is worth
# nothing, in units of one large image so that it means the same on every machine.
CLIENTS: Clients = {"interactive": (0.1, 1, 8.0), "standard": (0.7, 4, 40.0), "batch": (0.2, 7, None)}


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, of which kind and size, and for how many seconds an answer counts."""

    at: float  # seconds from the window's beginning; negative in the warm-up
    kind: str
    size: Size
    priority: int
    patience: float | None


@dataclass(frozen=True)
class Outcome:
    """How one request ended; latency is None where it was refused, dropped or given up, and `status` says how."""

    arrival: Arrival
    latency: float | None  # seconds
    status: str = "OK"

    @property
    def good(self) -> bool:
        """Whether it was answered while the answer counted."""
        patience = self.arrival.patience
        return self.latency is not None and (patience is None or self.latency <= patience)

    @property
    def answered_at(self) -> float:
        """When, on the clock of `Arrival.at`; infinity for never."""
        return math.inf if self.latency is None else self.arrival.at + self.latency


@dataclass(frozen=True)
class Mix:
    """Who asks, and for what: sizes and kinds of client by their share, and the seconds of a unit of patience."""

    sizes: Mapping[Size, float]
    unit: float
    clients: Clients = field(default_factory=lambda: CLIENTS)

    @property
    def warm_up(self) -> float:
        """Seconds until a queue that refuses nobody is longer than any patience, at twice the load that can be served.

        Under a smaller overload it still grows in the window, and where clients wait for ever it always does.
        """
        return 2 * max((units * self.unit for _, _, units in self.clients.values() if units is not None), default=0.0)


def above_zero(text: str) -> float:
    """A rate or a time from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is accepted")
    return value


def poisson(rate: float, seconds: float, mix: Mix, *, seed: int) -> list[Arrival]:
    """Arrivals independent of how the server fares, in a warm-up and a window of `seconds`: an open loop.

    `rate` times `seconds` come in the window, and at least one: given its count, a Poisson process has independent
    uniform times. Drawing the count too would change the load of a short window.
    """
    rng = random.Random(seed)
    before = _times(rng, round(rate * mix.warm_up), -mix.warm_up, 0.0)
    return [_arrival(rng, at, mix) for at in (*before, *_times(rng, max(1, round(rate * seconds)), 0.0, seconds))]


def _times(rng: random.Random, count: int, begin: float, end: float) -> list[float]:
    return sorted(begin + rng.random() * (end - begin) for _ in range(count))


def _arrival(rng: random.Random, at: float, mix: Mix) -> Arrival:
    kind = rng.choices(list(mix.clients), [share for share, _, _ in mix.clients.values()])[0]
    (size,) = rng.choices(list(mix.sizes), list(mix.sizes.values()))
    _, priority, units = mix.clients[kind]
    return Arrival(at, kind, size, priority, None if units is None else units * mix.unit)


def closed_summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Rates a second and latencies in milliseconds of a closed loop that sent requests for `seconds`."""
    seconds = max([seconds, *(o.answered_at for o in outcomes)])  # requests in progress at the end take time too
    rate = len(outcomes) / seconds
    figures = {"requests": len(outcomes), "seconds": seconds, "throughput": rate, "goodput": rate}
    return {**figures, "latency_ms": latency_ms(outcomes)}


def open_summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Rates a second and latencies in milliseconds of an open loop's window, over all and by kind of client.

    `rate` is the requests that came in the window; by kind, `good` is the share that was answered in time.
    """
    came = [o for o in outcomes if o.arrival.at >= 0]
    within = [o for o in outcomes if 0 <= o.answered_at < seconds]
    kinds = dict.fromkeys(o.arrival.kind for o in came)
    return {
        "rate": len(came) / seconds,
        "requests": _counts(came),
        "statuses": dict(Counter(o.status for o in came)),
        "seconds": seconds,
        "drain_seconds": max([0.0, *(o.answered_at - seconds for o in outcomes if o.latency is not None)]),
        "throughput": len(within) / seconds,
        "goodput": sum(o.good for o in within) / seconds,
        "latency_ms": latency_ms(came),
        "by_kind": {kind: _kind([o for o in came if o.arrival.kind == kind]) for kind in kinds},
    }


def _kind(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    counts = _counts(outcomes)
    return {"requests": counts, "good": counts["good"] / counts["offered"], "latency_ms": latency_ms(outcomes)}


def _counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    answered = sum(o.latency is not None for o in outcomes)
    return {"offered": len(outcomes), "answered": answered, "good": sum(o.good for o in outcomes)}


def latency_ms(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Percentiles of all `outcomes`, and `n`, their count; None where one does not lie between two answers."""
    answered = sorted(1e3 * o.latency for o in outcomes if o.latency is not None)
    slower = len(outcomes) - len(answered)  # than any of them, by an unknown amount
    known = percentiles([*answered, *answered[-1:] * slower] or [0.0])
    beyond = [p for p in PERCENTS if p * (len(outcomes) - 1) > 100 * (len(answered) - 1)]
    return {**known, "n": len(outcomes), **{f"p{percent}": None for percent in beyond}}
