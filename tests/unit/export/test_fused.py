"""The denoiser's fused form, and what stands in for operators on CUDA, against what they replace."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from export.build import lowering
from export.modules import load_components
from export.modules.denoiser import Denoiser
from export.modules.merged import merge_projections
from export.spec import Component, Precision, ShapePoint, component_specs, example_inputs
from tests.conftest import CHECKPOINT, ROOT

pytest.importorskip("triton")


def test_the_kernels_compute_what_their_references_say() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.export.interpreted_kernels"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 21
    # The interpreter cuts where hardware rounds, so bf16 is off by up to a whole digit; and in FP8 it halves what would
    # be rounded up to a power of two.
    limits = {"fp8": 0.1, "bfloat16": 1e-2, "float32": 1e-6}
    accepted = {name: next(limit for kind, limit in limits.items() if kind in name) for name in errors}
    assert {name: e for name, e in errors.items() if not e <= accepted[name]} == {}


def test_merged_projections_share_memory_with_those_they_replace() -> None:
    modules = load_components(CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=[Component.DENOISER])
    denoiser = modules[Component.DENOISER]
    assert isinstance(denoiser, Denoiser)
    before = {name: p.clone() for name, p in denoiser.named_parameters()}
    merge_projections(denoiser)
    merge_projections(denoiser)
    after = dict(denoiser.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    added = after.keys() - before.keys()
    assert len(added) == 2 * (len(denoiser.layers) + len(denoiser.noise_refiner))
    attention = denoiser.layers[0].attention  # type: ignore[union-attr]
    attention.qkv[0, 0] = 7.0
    assert attention.to_q.weight[0, 0] == 7.0
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in after.values()}
    assert sum(storages.values()) == sum(p.nbytes for p in before.values())


@pytest.mark.parametrize("shape", [(2, 64, 6, 10), (1, 32, 24)])
def test_group_norm_by_channels_is_group_norm(shape: tuple[int, ...]) -> None:
    x = 3 + torch.randn(shape)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    expected = F.group_norm(x, 8, weight, bias, 1e-6)
    assert (lowering.group_norm(x, 8, weight, bias, 1e-6) - expected).norm() / expected.norm() < 1e-5


def test_attention_in_chunks_is_attention() -> None:
    q, k, v = (torch.randn(2, 1, 24, 512) for _ in range(3))
    for scale in (None, 0.1):
        expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
        got = lowering.attention(q, k, v, scale=scale)
        assert (got - expected).norm() / expected.norm() < 1e-5


def test_doubled_pixels_are_nearest_upsampling() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(
        lowering.upsample_nearest(x, None, [2.0, 2.0]), F.interpolate(x, scale_factor=2.0, mode="nearest")
    )


def test_the_image_decoder_with_its_lowerings_draws_the_same() -> None:
    """Through the exported program, at a size that is not its example's: no operator is left that was to go."""
    from export.checkpoint import open_checkpoint
    from export.onnx import GraphLimits, export_program

    dimensions = open_checkpoint(CHECKPOINT).dimensions
    spec = component_specs(dimensions)[Component.IMAGE_DECODER]
    modules = load_components(CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=[Component.IMAGE_DECODER])
    module: nn.Module = modules[Component.IMAGE_DECODER]
    program = export_program(module, spec, dimensions, GraphLimits(max_rows=4, max_size=512))
    replaced = lowering.IMAGE_DECODER.keys()
    assert replaced <= {node.target for node in program.graph.nodes}
    program = lowering.lowered(program, Component.IMAGE_DECODER)
    assert not {node.target for node in program.graph.nodes} & replaced
    inputs = example_inputs(spec, ShapePoint(1, 32, 96, 208), dimensions)
    with torch.inference_mode():
        expected = module(**inputs).int()
        got = program.module()(*inputs.values()).int()
    assert (got - expected).abs().max() <= 1
    assert (got != expected).float().mean() < 1e-3
