"""On an NVIDIA GPU from compute capability 8.9 on: the denoiser's products in FP8. Run by `make test-gpu`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from export.devices import current_target
from export.kernels import reference
from export.manifest import Backend, Manifest
from export.modules.quantized import QuantizedLinear
from export.repository import versions
from export.spec import Component, Precision, ShapePoint, component_specs, example_inputs
from server.config import FallbackPolicy
from server.engines.eager import EagerModules
from server.engines.load import EngineLoader
from tests.conftest import CHECKPOINT, ROOT
from verify import parity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs an NVIDIA GPU of compute capability 8.9 or newer",
    ),
]
EPS = 1e-5


def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def check_quantized(got: tuple[Tensor, ...], expected: tuple[Tensor, Tensor]) -> None:
    """Equal but for values that lie between two of e4m3, where the last bit of fp32 decides."""
    for g, e in zip(got, expected, strict=True):
        assert (g.shape, g.dtype, g.stride()) == (e.shape, e.dtype, e.stride())
    assert error(got[1], expected[1]) < 1e-5
    assert float((got[0].float() != expected[0].float()).float().mean()) < 1e-3


# The published denoiser's width and the demo's, and those of their feed-forwards; tokens that fill no block.
@pytest.mark.parametrize(("batch", "tokens", "dim", "hidden"), [(1, 4160, 3840, 10240), (3, 77, 192, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_compute_what_their_references_say(
    batch: int, tokens: int, dim: int, hidden: int, dtype: torch.dtype
) -> None:
    from export.kernels import triton_kernels as kernels

    torch.manual_seed(1)
    x, branch = (made(batch, tokens, dim, dtype=dtype) for _ in range(2))
    weight, following = (made(dim, dtype=dtype) for _ in range(2))
    modulation, next_modulation = (made(batch, 4 * dim, dtype=dtype) for _ in range(2))
    x[0, 3] = 0
    check_quantized(kernels.quantize(x), reference.quantize(x))
    check_quantized(
        kernels.norm_modulate_quantize(x, weight, modulation, 2, EPS),
        reference.norm_modulate_quantize(x, weight, modulation, 2, EPS),
    )
    moved, *quantized = kernels.gated_residual_norm_modulate_quantize(
        x, branch, weight, modulation, 3, following, next_modulation, 0, EPS
    )
    assert error(moved, reference.gated_residual(x, branch, weight, modulation, 3, EPS)) < 4e-3
    check_quantized(tuple(quantized), reference.norm_modulate_quantize(moved, following, next_modulation, 0, EPS))
    gate_value = made(batch * tokens, 2 * hidden, dtype=dtype)
    check_quantized(kernels.silu_product_quantize(gate_value), reference.silu_product_quantize(gate_value))


@pytest.mark.parametrize(("rows", "inside", "outside"), [(4160, 3840, 11520), (77, 192, 576), (1, 512, 192)])
def test_a_quantized_linear_is_the_product_of_what_its_operands_stand_for(rows: int, inside: int, outside: int) -> None:
    torch.manual_seed(1)
    linear, (values, scales) = QuantizedLinear(made(outside, inside)), reference.quantize(made(rows, inside))
    expected = (values.float() * scales) @ (linear.weight.float() * linear.scale.t()).t()
    assert error(linear(values, scales), expected) < 1e-2


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo model, exported in fp8."""
    repository = tmp_path_factory.mktemp("fp8")
    command = [
        sys.executable, "-m", "zserve", "export", "--checkpoint", str(CHECKPOINT), "--repository", str(repository),
        "--name", "demo", "--backend", "aotinductor", "--precision", "fp8", "--default-size", "256x256",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return repository / "demo" / str(versions(repository / "demo")[-1])


def test_the_denoiser_in_fp8_is_close_to_eager_in_bf16(version: Path) -> None:
    """Also where calls are recorded and replayed, at shapes that alternate."""
    manifest = Manifest.read(version)
    modules = EagerModules(CHECKPOINT, manifest.precision, "cuda")
    loader = EngineLoader(version, manifest, current_target("cuda"), modules, 2, FallbackPolicy.REFUSE)
    engine, eager = loader.load_all()[Component.DENOISER], modules[Component.DENOISER]
    assert manifest.precision is Precision.FP8
    assert {p.dtype for p in eager.parameters()} == {torch.bfloat16}
    # Which are made only for a package that computes with them.
    assert {b.dtype for n, b in eager.named_buffers() if n.endswith("fp8_qkv.weight")} == {torch.float8_e4m3fn}
    spec = component_specs(manifest.checkpoint.dimensions)[Component.DENOISER]
    errors = []
    for turn in range(4):
        for point in (ShapePoint(1, 32, 256, 256), ShapePoint(2, 64, 96, 208), ShapePoint(3, 32, 64, 64)):
            inputs = example_inputs(spec, point, manifest.checkpoint.dimensions, seed=turn)
            inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
            got, use = engine.run(inputs)
            with torch.inference_mode():
                expected = eager(**inputs)
            assert use.backend is Backend.AOTINDUCTOR, use
            errors.append(error(got, expected))
    engine.close()
    assert max(errors) <= spec.tolerance[Precision.FP8], errors


def test_numbers_and_images_are_within_tolerance(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = parity.main([str(version.parent), "--json", "--images", "4"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0, report
    assert [c["backend"] for c in report["components"]] == ["aotinductor"] * 3
