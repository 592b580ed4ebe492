"""The one order of dispatcher and planner, by the figures that docs/operations.md promises."""

import pytest

from server.turns import Claim, Turns


def order(claims: dict[str, Claim], now: float = 0.0) -> list[str]:
    turns = Turns[str](claims.__getitem__)
    for name in claims:
        turns.add(name, 0.0)
    return turns.ordered(now)


def test_without_a_deadline_a_request_is_due_a_minute_after_it_arrived() -> None:
    claims = {"later": Claim(4, 2.0, deadline=61.0), "none": Claim(4, 0.0), "sooner": Claim(4, 0.0, deadline=59.0)}
    assert order(claims) == ["sooner", "none", "later"]


def test_nobody_is_overtaken_for_having_told_a_late_deadline() -> None:
    assert order({"none": Claim(4, 1.0), "late": Claim(4, 0.0, deadline=3600.0)}) == ["late", "none"]


@pytest.mark.parametrize(("now", "first"), [(29.0, "urgent"), (31.0, "patient")])
def test_half_a_minute_of_waiting_lifts_a_request_by_one_level(now: float, first: str) -> None:
    claims = {"patient": Claim(2, 0.0), "urgent": Claim(1, 20.0)}
    assert order(claims, now)[0] == first
