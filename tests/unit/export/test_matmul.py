"""Which of several kernels for a product is taken, and what the operator says of itself."""

import torch

from export.kernels.matmul import ROUNDS, fastest, linear


def test_the_fastest_is_taken_by_what_follows_the_first_round() -> None:
    asked: list[int] = []
    times = {0: [9.0, 2.0, 2.0, 7.0], 1: [1.0, 3.0, 3.0, 3.0], 2: [9.0, 4.0, 1.0, 4.0]}

    def seconds(number: int) -> float:
        asked.append(number)
        return times[number][asked.count(number) - 1]

    assert fastest(3, seconds) == 0
    assert asked == [0, 1, 2] * ROUNDS, "in turn"


def test_the_only_one_is_not_timed() -> None:
    assert fastest(1, lambda number: 1 / 0) == 0


def test_the_operator_is_torchs_own_on_a_cpu_and_keeps_its_promises() -> None:
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
    torch.library.opcheck(torch.ops.zserve.linear.default, (x, weight))
