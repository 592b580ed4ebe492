"""On an NVIDIA GPU: the kernels compute what their references say. Run by `make test-gpu`."""

import pytest
import torch
from torch import Tensor

from export.kernels import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
EPS = 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def made(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def close(got: Tensor, expected: Tensor) -> bool:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    return float((got.double() - expected.double()).norm() / expected.double().norm()) <= TOLERANCE[got.dtype]


# The published denoiser's heads and the demo's; tokens that fill no block.
@pytest.mark.parametrize(("batch", "tokens", "heads", "head_dim"), [(1, 4160, 30, 128), (3, 77, 3, 64)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_kernels_compute_what_their_references_say(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    from export.kernels import triton_kernels as kernels

    torch.manual_seed(1)
    dim = heads * head_dim
    x, branch = (made(batch, tokens, dim, dtype=dtype) for _ in range(2))
    weight, following = (made(dim, dtype=dtype) for _ in range(2))
    modulation, next_modulation = (made(batch, 4 * dim, dtype=dtype) for _ in range(2))
    moved = reference.gated_residual(x, branch, weight, modulation, 3, EPS)
    normed = reference.norm_modulate(moved, following, next_modulation, 0, EPS)
    assert close(kernels.norm_modulate(moved, following, next_modulation, 0, EPS), normed)
    assert close(kernels.gated_residual(x, branch, weight, modulation, 3, EPS), moved)
    both = kernels.gated_residual_norm_modulate(
        x, branch, weight, modulation, 3, following, next_modulation, 0, EPS
    )  # fmt: skip
    assert all(map(close, both, (moved, normed)))
    qkv, weights = made(batch, tokens, 3 * dim, dtype=dtype), [made(head_dim, dtype=dtype) for _ in range(2)]
    tables = [made(tokens, head_dim // 2, dtype=torch.float32) for _ in range(2)]
    got = kernels.norm_rotate(qkv, *weights, *tables, EPS)
    assert all(map(close, got, reference.norm_rotate(qkv, *weights, *tables, EPS)))
