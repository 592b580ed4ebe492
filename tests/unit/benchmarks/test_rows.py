"""What rows are given to draw."""

import pytest

from benchmarks.record import BenchmarkError
from benchmarks.rows import alike, prompts, warmed


def test_prompts_that_are_drawn_together_are_different_and_equally_long() -> None:
    assert list(alike(["a", "bb", "c", "d", "ee", "ff", "g"], len, 2)) == [["a", "c"], ["bb", "ee"], ["d", "g"]]
    assert [text for group in alike(prompts(9), len, 1) for text in group] == prompts(9)
    assert len(set(prompts(400))) == 400


def test_every_length_that_counts_is_warmed_up_before() -> None:
    """The first call of a length that comes once in ten would be measured otherwise."""
    groups = [["a"], ["b"], ["cc"], ["d"], ["e"], ["ffff"], ["gg"], ["h"], ["ii"]]
    before, counted = warmed(iter(groups), len, warm_up=2, repetitions=4)
    assert counted == [["a"], ["b"], ["cc"], ["d"]]
    assert before == [["e"], ["gg"], ["h"], ["ii"]]
    with pytest.raises(BenchmarkError, match="too few prompts"):
        warmed(iter(groups), len, warm_up=3, repetitions=4)
