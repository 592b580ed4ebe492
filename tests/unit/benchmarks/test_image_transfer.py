"""Every picture that `zserve bench image_transfer` times is the one that was sent."""

import psutil
import pytest

from benchmarks.image_transfer import Answer, format_costs, picture
from benchmarks.record import BenchmarkError

WARM_UP = 3


def test_an_answer_that_is_another_picture_ends_the_benchmark() -> None:
    """The last of the timed ones: all before it were right."""
    right, asked = picture(), 0
    wrong = right.copy()
    wrong[0, 0, 0] ^= 1

    def call(image_format: str) -> Answer:
        nonlocal asked
        asked += 1
        return (wrong if asked == last else right).tobytes(), 1.0

    last = 0
    costs = format_costs("raw", {"worker": call}, 2, psutil.Process())
    assert costs["worker"]["n"] == 2
    asked, last = 0, WARM_UP + 2
    with pytest.raises(BenchmarkError, match="raw: not the picture that was sent"):
        format_costs("raw", {"worker": call}, 2, psutil.Process())
