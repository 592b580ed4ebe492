"""What rows are given to draw."""

from benchmarks.rows import alike, prompts


def test_prompts_that_are_drawn_together_are_different_and_equally_long() -> None:
    assert list(alike(["a", "bb", "c", "d", "ee", "ff", "g"], len, 2)) == [["a", "c"], ["bb", "ee"], ["d", "g"]]
    assert [text for group in alike(prompts(9), len, 1) for text in group] == prompts(9)
    assert len(set(prompts(400))) == 400
