"""Which load is offered, and what is counted of how it went."""

import argparse
from dataclasses import replace

import pytest

from benchmarks.workload import (
    CLIENTS,
    Arrival,
    Mix,
    Outcome,
    above_zero,
    closed_summary,
    latency_ms,
    open_summary,
    poisson,
)

ONE_KIND = {"all": (1.0, 0, 1.0)}


def outcome(at: float, latency: float | None, patience: float | None = 1.0, status: str = "OK") -> Outcome:
    return Outcome(Arrival(at, "all", (64, 64), 0, patience), latency, status)


def test_arrivals_are_the_same_for_every_policy_and_come_in_their_order() -> None:
    mix = Mix({(128, 128): 1.0, (256, 256): 1.0}, unit=2.0)
    arrivals = poisson(20.0, 50.0, mix, seed=3)
    assert arrivals == poisson(20.0, 50.0, mix, seed=3)
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert {a.kind for a in arrivals} == set(CLIENTS)
    assert {a.patience for a in arrivals} == {16.0, 80.0, None}


@pytest.mark.parametrize("rate", [0.02, 0.97, 1.55, 1.85, 2.33, 20.0])
@pytest.mark.parametrize("seed", [7, 11])
def test_as_much_comes_as_was_asked_for(rate: float, seed: int) -> None:
    """A window of 10 s had 12 requests instead of 10, and 19 instead of 23; before it comes the warm-up."""
    mix = Mix({(64, 64): 1.0}, unit=4.0, clients=ONE_KIND)
    arrivals = poisson(rate, 10.0, mix, seed=seed)
    counted = [a.at for a in arrivals if a.at >= 0]
    assert len(counted) == max(1, round(rate * 10))
    assert max(counted) < 10.0
    assert len(arrivals) - len(counted) == round(rate * 8)
    assert min(a.at for a in arrivals) >= -8.0


def test_the_warm_up_is_twice_the_longest_that_somebody_waits() -> None:
    assert Mix({}, unit=2.0).warm_up == 160.0
    assert Mix({}, unit=2.0, clients={"batch": (1.0, 7, None)}).warm_up == 0.0


def test_a_closed_loop_takes_until_its_last_answer() -> None:
    told = closed_summary([outcome(0.0, 0.5, None), outcome(0.5, 2.5, None)], seconds=2.0)
    assert (told["requests"], told["seconds"]) == (2, 3.0)
    assert told["throughput"] == told["goodput"] == pytest.approx(2 / 3)
    assert told["latency_ms"]["n"] == 2


def test_goodput_counts_what_came_in_time_while_the_load_lasted() -> None:
    before, late = outcome(-1.0, 0.5), outcome(0.5, 1.2)
    warm, good, after = outcome(-0.5, 0.75), outcome(1.0, 0.5), outcome(1.75, 0.5)
    refused = outcome(1.5, None, status="DEADLINE_EXCEEDED")
    told = open_summary([before, warm, late, good, refused, after], seconds=2.0)
    assert told["goodput"] == 2 / 2.0  # warm, good
    assert told["throughput"] == 3 / 2.0  # they, late
    assert told["rate"] == 4 / 2.0
    assert told["requests"] == {"offered": 4, "answered": 3, "good": 2}
    assert told["statuses"] == {"OK": 3, "DEADLINE_EXCEEDED": 1}
    assert (told["seconds"], told["drain_seconds"]) == (2.0, 0.25)
    assert told["latency_ms"]["n"] == 4
    assert told["by_kind"]["all"]["requests"] == told["requests"]
    assert told["by_kind"]["all"]["good"] == 0.5
    assert open_summary([good], seconds=2.0)["drain_seconds"] == 0.0


def served(arrivals: list[Arrival], *, refuses: bool) -> list[Outcome]:
    """By a server that does one a second, in order; it may refuse whom it cannot serve in time."""
    outcomes, free = [], -1e9
    for arrival in arrivals:
        done = max(free, arrival.at) + 1.0
        taken = not refuses or arrival.patience is None or done - arrival.at <= arrival.patience
        outcomes.append(Outcome(arrival, done - arrival.at if taken else None))
        free = done if taken else free
    return outcomes


@pytest.mark.parametrize("seconds", [5.0, 20.0, 80.0])
@pytest.mark.parametrize(("refuses", "goodput"), [(True, 1.0), (False, 0.0)])
def test_overload_gives_the_same_goodput_for_however_long_it_lasts(
    refuses: bool, goodput: float, seconds: float
) -> None:
    """Neither the queue that is yet to form nor the one that is left makes it more or less."""
    mix = Mix({(64, 64): 1.0}, unit=10.0, clients=ONE_KIND)
    told = open_summary(served(poisson(3.0, seconds, mix, seed=1), refuses=refuses), seconds)
    assert told["goodput"] == pytest.approx(goodput, abs=1 / seconds)
    assert told["throughput"] == pytest.approx(1.0, abs=1 / seconds)
    assert told["drain_seconds"] > 5.0


def test_a_request_without_an_answer_is_later_than_all_that_have_one() -> None:
    answered = [outcome(0.0, 0.001 * ms) for ms in range(81)]
    told = latency_ms([*answered, *[outcome(0.0, None)] * 20])
    assert told == {"p10": 10.0, "p50": 50.0, "p90": None, "p95": None, "p99": None, "n": 101}
    assert latency_ms([outcome(0.0, 0.25)])["p99"] == 250.0
    assert latency_ms([outcome(0.0, 0.25), outcome(0.0, None)])["p50"] is None  # half way to nobody knows where
    assert latency_ms([outcome(0.0, None)]) == {"p10": None, "p50": None, "p90": None, "p95": None, "p99": None, "n": 1}


def test_an_answer_counts_for_as_long_as_its_client_waits() -> None:
    assert outcome(0.0, 1.0).good
    assert not outcome(0.0, 1.1).good
    assert not replace(outcome(0.0, 1.0), latency=None).good
    assert outcome(0.0, 1e6, patience=None).good


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "many", ""])
def test_what_is_no_rate_or_time_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a number above 0 is accepted"):
        above_zero(text)
    assert above_zero("0.5") == 0.5
