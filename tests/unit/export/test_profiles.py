"""The shapes that engines are built for and tuned at."""

import pytest

from export.profiles import serving_profiles, tuning_example
from export.spec import EXPORT_EXAMPLE, MIN_SIZE, SIZE_MULTIPLE


@pytest.mark.parametrize(
    "size", [(1024, 1024), (512, 1024), (2048, 2048), (64, 64), (2048, 512), (2048, 64), (80, 2048)]
)
def test_kernels_are_tuned_near_the_default_size_at_no_special_shape(size: tuple[int, int]) -> None:
    example = tuning_example(serving_profiles(size, max_rows=8, max_size=2048))
    assert example.height == size[1]
    assert example.height != example.width, "a square would be baked into the graph"
    assert example.batch == EXPORT_EXAMPLE.batch
    assert MIN_SIZE <= example.width <= 2048
    assert example.width % SIZE_MULTIPLE == 0
    assert example.caption > 32
