"""Runs every kernel in Triton's interpreter against its reference; prints the relative errors as JSON.

A program of its own, because Triton reads TRITON_INTERPRET when a kernel is defined, for good.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from diffusers import AutoencoderKL

from export.checkpoint import open_checkpoint
from export.kernels import group_norm, reference, swiglu
from export.kernels import triton_kernels as kernels
from export.modules import load_components
from export.modules.denoiser import Denoiser
from export.modules.fused import fused
from export.modules.fused_decoder import fused_decoder
from export.modules.fused_encoder import fused_encoder
from export.modules.image_decoder import ImageDecoder
from export.modules.prompt_encoder import PromptEncoder
from export.spec import Component, Precision, ShapePoint, component_specs, example_inputs
from tests.conftest import CHECKPOINT

EPS = 1e-5
BATCH, TOKENS, HEADS, HEAD_DIM = 2, 5, 3, 16  # neither the width nor the number of heads is a power of two
DIM = HEADS * HEAD_DIM


def main() -> None:
    errors = {}
    group_norm.PROGRAMS = group_norm.CHUNK = 8  # fewer, for the interpreter's sake
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)

        def made(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, dtype=torch.float32).to(dtype)

        x, branch, weight, following = made(BATCH, TOKENS, DIM), made(BATCH, TOKENS, DIM), made(DIM), made(DIM)
        modulation, next_modulation = made(BATCH, 4 * DIM), made(BATCH, 4 * DIM)
        qkv, weight_q, weight_k = made(BATCH, TOKENS, 3 * DIM), made(HEAD_DIM), made(HEAD_DIM)
        cos, sin = (made(TOKENS, HEAD_DIM // 2, dtype=torch.float32) for _ in range(2))
        grouped, tables = made(BATCH, TOKENS, (3 + 2 + 2) * 12), [made(BATCH, TOKENS, 12) for _ in range(2)]
        weights_of_halves = made(12), made(12)
        gate_value = made(BATCH * TOKENS, 2 * DIM)
        moved = reference.gated_residual(x, branch, weight, modulation, 3, EPS)
        pairs = {
            "norm_modulate": (
                [kernels.norm_modulate(x, weight, modulation, 2, EPS)],
                [reference.norm_modulate(x, weight, modulation, 2, EPS)],
            ),
            "gated_residual": ([kernels.gated_residual(x, branch, weight, modulation, 3, EPS)], [moved]),
            "gated_residual_norm_modulate": (
                kernels.gated_residual_norm_modulate(
                    x, branch, weight, modulation, 3, following, next_modulation, 0, EPS
                ),
                [moved, reference.norm_modulate(moved, following, next_modulation, 0, EPS)],
            ),
            "norm_rotate": (
                kernels.norm_rotate(qkv, weight_q, weight_k, cos, sin, EPS),
                reference.norm_rotate(qkv, weight_q, weight_k, cos, sin, EPS),
            ),
            "norm_rotate_halves": (
                kernels.norm_rotate_halves(grouped, *weights_of_halves, *tables, 3, EPS),
                reference.norm_rotate_halves(grouped, *weights_of_halves, *tables, 3, EPS),
            ),
        }
        both = kernels.gated_residual_norm_modulate_quantize(
            x, branch, weight, modulation, 3, following, next_modulation, 0, EPS
        )
        pairs |= {
            "fp8 quantize": (kernels.quantize(x), reference.quantize(x)),
            "fp8 norm_modulate": (
                kernels.norm_modulate_quantize(x, weight, modulation, 2, EPS),
                reference.norm_modulate_quantize(x, weight, modulation, 2, EPS),
            ),
            "fp8 gated_residual_norm_modulate": (
                both,
                [moved, *reference.norm_modulate_quantize(both[0], following, next_modulation, 0, EPS)],
            ),
            "fp8 silu_product": (
                kernels.silu_product_quantize(gate_value),
                reference.silu_product_quantize(gate_value),
            ),
        }
        for name, (got, expected) in pairs.items():
            assert [(g.shape, g.dtype) for g in got] == [(e.shape, e.dtype) for e in expected], name
            errors[f"{name} {dtype}"] = max(map(_error, got, expected))
        errors |= _image_errors(dtype)
    errors |= _swiglu_errors()
    errors["fused prompt encoder in float32"] = _prompt_encoder_error()
    errors["fused denoiser in float32"] = _denoiser_error(Precision.FP32)
    errors["fused denoiser in fp8"] = _denoiser_error(Precision.FP8)
    errors |= _image_decoder_errors()
    print(json.dumps(errors))


def _image_errors(dtype: torch.dtype) -> dict[str, float]:
    """Of an image that its programs cannot share evenly, whose channels are no power of two."""
    height, width, channels, groups = 9, 11, 48, 16
    x, branch = (torch.randn(4 * height * width, channels).to(dtype) for _ in range(2))
    bias, weight, offset = (torch.randn(channels).to(dtype) for _ in range(3))
    phases = torch.randn(height + 1, width + 1, 4 * channels).to(dtype)
    added, interleaved = reference.add(x, branch, bias), reference.interleave(phases, bias)
    sums = group_norm.channel_sums(x)
    arguments = (len(x), groups, weight, bias, offset, EPS)
    affine = group_norm.affine(sums, *arguments)
    wide = (t.float() for t in (x + offset, weight, bias))
    image, factor, summand = wide
    normalised = torch.nn.functional.group_norm(image.T[None], groups, factor, summand, EPS)[0].T
    pairs = {
        "channel_sums": ([sums.sum(0)], [reference.channel_sums(x)[0]]),
        "add": (group_norm.add(x, branch, bias), [added, reference.channel_sums(added)]),
        "interleave": (group_norm.interleave(phases, bias), [interleaved, reference.channel_sums(interleaved)]),
        "affine": ([affine], [reference.affine(reference.channel_sums(x), *arguments)]),
        "affine as group norm": ([x.float() * affine[0] + affine[1]], [normalised]),
    }
    errors = {}
    for name, (got, expected) in pairs.items():
        whole = [g.sum(0, keepdim=True) if g.ndim == 3 else g for g in got]  # sums come by program
        assert [g.shape for g in whole] == [e.shape for e in expected], name
        errors[f"{name} {dtype}"] = max(map(_error, whole, expected))
    return errors


def _swiglu_errors() -> dict[str, float]:
    """In float32: the interpreter multiplies the bits of bf16, not what they stand for."""
    x, w13 = torch.randn(130, DIM), torch.randn(2 * 200, DIM)  # two tiles by two, of which only the first is full
    errors = {}
    for programs in (1, 3, 9):  # all tiles whole; three whole and the last in halves; all in halves
        out = torch.full((130, 200), torch.nan)
        swiglu.launch(x, w13, out, programs)
        errors[f"swiglu of {programs} programs in float32"] = _error(out, reference.swiglu(x, w13))
    return errors


def _prompt_encoder_error() -> float:
    """Of the demo's, which still computes the same in its own form afterwards."""
    plain = load_components(CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=[Component.PROMPT_ENCODER])
    encoder = plain[Component.PROMPT_ENCODER]
    assert isinstance(encoder, PromptEncoder)
    vocabulary = open_checkpoint(CHECKPOINT).dimensions.vocabulary
    ids = torch.randint(0, vocabulary, (2, 64), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([40, 64])
    with torch.inference_mode():
        expected = encoder(ids, lengths)
        got = fused_encoder(encoder)(ids, lengths)
        assert torch.equal(encoder(ids, lengths), expected)
    return _error(got, expected)


def _denoiser_error(precision: Precision) -> float:
    """Of the demo's denoiser, which still computes the same in its own form afterwards.

    Of four main blocks: in FP8 the two between are quantised, so that every kind of block follows every other.
    """
    plain = load_components(CHECKPOINT, precision=precision, device="cpu", wanted=[Component.DENOISER])
    denoiser = plain[Component.DENOISER]
    assert isinstance(denoiser, Denoiser)
    denoiser.layers = denoiser.layers[:4]
    dimensions = open_checkpoint(CHECKPOINT).dimensions
    inputs = example_inputs(component_specs(dimensions)[Component.DENOISER], ShapePoint(1, 32, 64, 96), dimensions)
    with torch.inference_mode():
        expected = denoiser(**inputs)
        got = fused(denoiser, precision)(**inputs)
        assert torch.equal(denoiser(**inputs), expected)
    return _error(got, expected)


def _image_decoder_errors() -> dict[str, float]:
    """Of the demo's, and of one that has all else that a checkpoint may have."""
    modules = load_components(CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=[Component.IMAGE_DECODER])
    odd = AutoencoderKL(
        block_out_channels=(16, 24, 24, 48),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3],
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=4,
        act_fn="relu",
        mid_block_add_attention=False,
    )
    decoders = {"demo's": modules[Component.IMAGE_DECODER], "odd": ImageDecoder(odd.eval())}
    return {f"{name} image decoder in float32": _image_decoder_error(decoder) for name, decoder in decoders.items()}


def _image_decoder_error(decoder: torch.nn.Module) -> float:
    """Of one whose eager form still computes the same afterwards."""
    assert isinstance(decoder, ImageDecoder)
    z = torch.randn(1, 16, 4, 6)
    with torch.inference_mode():
        expected = decoder.run_decoder(decoder.decoder, z)
        got = fused_decoder(decoder).run_decoder(decoder.decoder, z)
        assert torch.equal(decoder.run_decoder(decoder.decoder, z), expected)
    return _error(got, expected)


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative; of values in FP8 the share that is not equal."""
    if got.dtype is torch.float8_e4m3fn:
        return float((got.float() != expected.float()).float().mean())
    return float((got.double() - expected.double()).norm() / expected.double().norm())


if __name__ == "__main__":
    main()
