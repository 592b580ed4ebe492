"""On an NVIDIA GPU: the kernels compute what their references say. Run by `make test-gpu`."""

import pytest
import torch
from torch import Tensor

from export.kernels import reference
from export.kernels.hopper import is_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CUDA = torch.device("cuda")
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


# The published prompt encoder's heads and the demo's; tokens that fill no block.
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "key_heads", "head_dim"), [(1, 64, 32, 8, 128), (3, 77, 3, 1, 64)]
)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_queries_and_keys_of_the_prompt_are_rotated_as_their_reference_says(
    batch: int, tokens: int, heads: int, key_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    from export.kernels import triton_kernels as kernels

    torch.manual_seed(1)
    qkv = made(batch, tokens, (heads + 2 * key_heads) * head_dim, dtype=dtype)
    weights = [made(head_dim, dtype=dtype) for _ in range(2)]
    tables = [made(batch, tokens, head_dim, dtype=dtype) for _ in range(2)]
    got = kernels.norm_rotate_halves(qkv, *weights, *tables, heads, EPS)
    assert all(map(close, got, reference.norm_rotate_halves(qkv, *weights, *tables, heads, EPS)))


# The published feed-forward at 1024x1024, at 512x512 (where the last tiles are taken in halves), and the demo's.
@pytest.mark.parametrize(("tokens", "dim", "hidden"), [(4160, 3840, 10240), (1088, 3840, 10240), (77, 192, 512)])
def test_swiglu_computes_what_its_reference_says(tokens: int, dim: int, hidden: int) -> None:
    if not is_hopper(CUDA):
        pytest.skip("needs a Hopper GPU")
    import triton

    from export.kernels import swiglu

    torch.manual_seed(1)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=CUDA))
    x, w13 = made(tokens, dim, dtype=torch.bfloat16), made(2 * hidden, dim, dtype=torch.bfloat16) / dim**0.5
    assert swiglu.suits(x, w13)
    assert not swiglu.suits(x[:, 1:], w13[:, 1:]), "TMA takes rows of whole 16 bytes"
    out = torch.full((tokens, hidden), torch.nan, dtype=torch.bfloat16, device=CUDA)
    swiglu.launch(x, w13, out, torch.cuda.get_device_properties(CUDA).multi_processor_count)
    assert close(out, reference.swiglu(x, w13))


@pytest.mark.parametrize(("batch", "tokens", "heads", "head_dim"), [(1, 4160, 30, 128), (3, 77, 3, 64)])
def test_attention_is_attention(batch: int, tokens: int, heads: int, head_dim: int) -> None:
    from export.kernels import attention

    if not attention.is_there(CUDA):
        pytest.skip("needs a Hopper GPU and the package fa3-fwd")
    torch.manual_seed(1)
    width = heads * head_dim
    qkv = made(batch, tokens, 3 * width, dtype=torch.bfloat16)
    q, k, v = (part.unflatten(-1, (heads, head_dim)) for part in qkv.chunk(3, -1))  # as they come: not contiguous
    wide = [part.float().transpose(1, 2) for part in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)
    assert close(attention.attention(q, k, v), expected.bfloat16())


# The published image decoder's largest map and its smallest, and a map of the demo's.
@pytest.mark.parametrize(
    ("height", "width", "channels", "groups"), [(512, 512, 256, 32), (64, 64, 512, 32), (9, 11, 48, 16)]
)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_images_are_summed_added_and_interleaved_as_their_references_say(
    height: int, width: int, channels: int, groups: int, dtype: torch.dtype
) -> None:
    from export.kernels import group_norm as kernels

    torch.manual_seed(1)
    x, branch = (made(4 * height * width, channels, dtype=dtype) for _ in range(2))
    bias, weight, offset = (made(channels, dtype=dtype) for _ in range(3))
    phases = made(height + 1, width + 1, 4 * channels, dtype=dtype)
    for expected, (got, sums) in (
        (reference.add(x, branch, bias), kernels.add(x, branch, bias)),
        (reference.interleave(phases, bias), kernels.interleave(phases, bias)),
    ):
        assert close(got, expected)
        exact = got.double()
        of_values, of_squares = sums.double().sum(0)
        assert (of_values - exact.sum(0)).abs().max() <= 1e-6 * exact.abs().sum(0).max()
        assert (of_squares - exact.square().sum(0)).abs().max() <= 1e-6 * exact.square().sum(0).max()
    scale, shift = kernels.affine(kernels.channel_sums(x), len(x), groups, weight, bias, offset, EPS)
    image = (x.double() + offset.double()).T[None]
    expected = torch.nn.functional.group_norm(image, groups, weight.double(), bias.double(), EPS)[0].T
    assert ((x.double() * scale + shift) - expected).norm() / expected.norm() <= 1e-5
