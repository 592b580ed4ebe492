"""When waiting requests start and how long they take, on workers that differ: examples reckoned by hand."""

from server.frontend.forecast import Forecast, Work, forecasts
from server.turns import Rank


def rank(level: int, due: float = 60.0) -> Rank:
    return level, False, due, 0.0


def test_of_what_a_worker_holds_only_what_is_as_urgent_goes_ahead() -> None:
    held = [[Work(rank(3), 7.0), Work(rank(1), 5.0), Work(rank(2), 2.0)]]
    assert forecasts([(rank(2), [1.0])], held) == [Forecast(7.0, 1.0)]
    assert forecasts([(rank(1, due=0.0), [1.0])], held) == [Forecast(0.0, 1.0)]


def test_what_is_held_goes_between_those_who_wait_by_its_rank() -> None:
    waiting = [(rank(1), [1.0]), (rank(3), [1.0])]
    assert forecasts(waiting, [[Work(rank(2), 4.0)]]) == [Forecast(0.0, 1.0), Forecast(5.0, 1.0)]


def test_who_waits_takes_the_worker_that_is_done_first_even_if_another_is_free_before() -> None:
    held = [[Work(rank(1), 5.0)], []]
    assert forecasts([(rank(2), [1.0, 10.0])], held) == [Forecast(5.0, 1.0)]


def test_each_who_waits_has_those_before_it_ahead_on_whichever_worker_they_take() -> None:
    waiting = [(rank(1), [1.0, 4.0])] * 5
    found = forecasts(waiting, [[], []])
    assert found == [Forecast(start, 1.0) for start in (0.0, 1.0, 2.0, 3.0)] + [Forecast(0.0, 4.0)]


def test_without_a_worker_there_is_nothing_to_say() -> None:
    assert forecasts([(rank(1), [])], []) is None
