"""The denoiser's products in FP8: the arithmetic, the blocks that have it, and who gets it."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export import cli
from export.checkpoint import open_checkpoint
from export.cli import NOT_POSSIBLE
from export.kernels import reference
from export.modules import load_components
from export.modules.denoiser import Denoiser
from export.modules.quantized import QuantizedLinear, quantize_projections
from export.onnx import GraphLimits, export_program
from export.packages import open_package
from export.spec import IMAGE_PSNR, Component, Precision, ShapePoint, component_specs, example_inputs
from tests.conftest import CHECKPOINT

DIMENSIONS = open_checkpoint(CHECKPOINT).dimensions
SPEC = component_specs(DIMENSIONS)[Component.DENOISER]
LINEARS = ("attention.fp8_qkv", "attention.fp8_out", "feed_forward.fp8_w13", "feed_forward.fp8_w2")
BUFFERS = {  # of the demo's eight blocks, all but the first and the last
    f"layers.{number}.{linear}.{name}" for number in range(1, 7) for linear in LINEARS for name in ("weight", "scale")
}


@pytest.fixture
def denoiser() -> Denoiser:
    module = load_components(CHECKPOINT, precision=Precision.FP8, device="cpu", wanted=[Component.DENOISER])
    denoiser = module[Component.DENOISER]
    assert isinstance(denoiser, Denoiser)
    return denoiser


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def test_every_value_becomes_the_nearest_that_e4m3_holds() -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)) * torch.logspace(-8, 8, 7).unsqueeze(1)
    values, scales = reference.quantize(x)
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (torch.float8_e4m3fn, (7, 33), x.dtype, (7, 1))
    held = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    held = held[held.isfinite()]
    wanted = (x / scales).unsqueeze(-1)
    assert torch.equal((values.float() - wanted[..., 0]).abs(), (held - wanted).abs().amin(-1))
    assert torch.equal(values.float().abs().amax(-1), torch.full((7,), 448.0))
    torch.testing.assert_close(scales[:, 0], x.abs().amax(-1) / 448, rtol=0, atol=0)


def test_a_row_of_zeros_stays_one_and_what_is_not_finite_is_seen() -> None:
    values, scales = reference.quantize(torch.tensor([[0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0]]))
    dequantised = values.float() * scales
    assert torch.equal(dequantised[0], torch.zeros(2))
    assert dequantised[1:].isnan().any(-1).all()


def test_silu_product_is_that_of_the_feed_forward() -> None:
    both = torch.randn(5, 64)
    gate, value = both.chunk(2, -1)
    values, scales = reference.silu_product_quantize(both)
    assert error(values.float() * scales, torch.nn.functional.silu(gate) * value) < 4e-2


def test_a_quantized_linear_is_the_product_of_what_its_operands_stand_for() -> None:
    weight, x = torch.randn(48, 64).bfloat16(), torch.randn(5, 64)
    linear = QuantizedLinear(weight)
    values, scales = reference.quantize(x)
    wide = (linear.weight.double() * linear.scale.double().t()).t()
    got = linear(values, scales)
    assert got.dtype is torch.bfloat16
    assert error(got, values.double() * scales.double() @ wide) < 4e-3
    assert error(got, x @ weight.float().t()) < 6e-2


def test_the_first_and_the_last_block_and_all_else_stay_as_they_are(denoiser: Denoiser) -> None:
    before = {name: p.clone() for name, p in denoiser.named_parameters()}
    buffers = dict(denoiser.named_buffers()).keys()
    quantize_projections(denoiser)
    made = dict(denoiser.named_buffers())
    quantize_projections(denoiser)
    assert all(tensor is made[name] for name, tensor in denoiser.named_buffers())
    assert made.keys() - buffers == BUFFERS
    after = dict(denoiser.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert {p.dtype for p in after.values()} == {torch.bfloat16}


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references in the kernels' place, since these compute on a GPU alone."""
    pytest.importorskip("triton")
    from export.kernels import triton_kernels
    from export.modules.products import PlainProducts

    def moved(*arguments: Any) -> tuple[Tensor, Tensor]:
        x = reference.gated_residual(*arguments[:5], arguments[-1])
        return x, reference.norm_modulate(x, *arguments[5:])

    def moved_quantize(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = reference.gated_residual(*arguments[:5], arguments[-1])
        return x, *reference.norm_modulate_quantize(x, *arguments[5:])

    same = ("gated_residual", "norm_rotate", "quantize", "norm_modulate_quantize", "silu_product_quantize")
    for name in same:
        monkeypatch.setattr(triton_kernels, name, getattr(reference, name))
    monkeypatch.setattr(triton_kernels, "gated_residual_norm_modulate_quantize", moved_quantize)
    monkeypatch.setattr(PlainProducts, "norm_modulate", staticmethod(reference.norm_modulate))
    monkeypatch.setattr(PlainProducts, "gated_residual_norm_modulate", staticmethod(moved))


@pytest.mark.usefixtures("plain_kernels")
def test_the_denoiser_in_fp8_is_close_to_the_one_in_bf16(denoiser: Denoiser) -> None:
    from export.modules.fused import fused

    inputs = example_inputs(SPEC, ShapePoint(2, 32, 96, 128), DIMENSIONS)
    with torch.inference_mode():
        expected = denoiser(**inputs)
        in_fp8 = fused(denoiser, Precision.FP8)(**inputs)
        in_bf16 = fused(denoiser, Precision.BF16)(**inputs)
        assert torch.equal(denoiser(**inputs), expected), "eager changed"
    assert error(in_bf16, expected) < 1.5e-2
    assert 1.5e-2 < error(in_fp8, expected) < 5e-2


def test_its_graph_has_four_products_in_fp8_a_block_at_every_shape(denoiser: Denoiser) -> None:
    pytest.importorskip("triton")
    from export.modules.fused import fused

    program = export_program(fused(denoiser, Precision.FP8), SPEC, DIMENSIONS, GraphLimits(max_rows=8, max_size=512))
    calls = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert calls["aten._scaled_mm.default"] == 4 * 6
    assert calls["zserve.quantize.default"] == calls["zserve.silu_product_quantize.default"] == 6
    # What goes into a block is made by what ends the one before it.
    assert calls["zserve.gated_residual_norm_modulate_quantize.default"] == 2 * 6
    assert calls["zserve.norm_modulate_quantize.default"] == 0
    assert program.state_dict.keys() >= BUFFERS


class Package:
    """What torch gives for one that wants these weights."""

    def __init__(self, wanted: list[str]) -> None:
        self._wanted = wanted
        self.lent: dict[str, Tensor] = {}

    def get_constant_fqns(self) -> list[str]:
        return self._wanted

    def load_constants(self, wanted: dict[str, Tensor], *_: bool) -> None:
        self.lent = wanted


@pytest.mark.parametrize(
    ("wanted", "made"),
    [
        ("layers.1.attention.to_q.weight", 0),
        ("layers.1.attention.qkv", 0),
        ("layers.1.attention.fp8_qkv.weight", len(BUFFERS)),
    ],
)
def test_weights_in_fp8_are_made_for_a_package_that_wants_them(
    denoiser: Denoiser, wanted: str, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package([wanted])
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda *_: package)
    buffers = len(dict(denoiser.named_buffers()))
    open_package(Path("denoiser.pt2"), denoiser)
    assert len(dict(denoiser.named_buffers())) - buffers == made
    assert package.lent[wanted] is {**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())}[wanted]


def test_every_precision_has_its_tolerances_and_its_weights() -> None:
    for spec in component_specs(DIMENSIONS).values():
        assert spec.tolerance.keys() == set(Precision)
    assert IMAGE_PSNR.keys() == set(Precision)
    assert {p.weights for p in Precision} == {Precision.FP32, Precision.BF16}


@pytest.mark.parametrize(
    ("capability", "status", "said"),
    [
        ((8, 9), 0, "aotinductor in fp8"),
        ((12, 0), 0, "aotinductor in fp8"),
        ((8, 6), NOT_POSSIBLE, "8.6.* is asked for"),
    ],
)
def test_it_is_for_gpus_that_have_it(
    capability: tuple[int, int],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA")
    fixed = ["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", "m", "--dry-run"]
    assert cli.main([*fixed, "--precision", "fp8"]) == status
    printed = "".join(capsys.readouterr())
    assert re.search(said, printed), printed
