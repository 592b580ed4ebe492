"""The components' fused forms, and what stands in for operators on CUDA, against what they replace."""

import json
import subprocess
import sys
import weakref

import pytest
import torch

from export.checkpoint import open_checkpoint
from export.kernels import attention, reference
from export.modules import load_components
from export.modules.blocks import Foreign
from export.modules.denoiser import Denoiser
from export.modules.fused_decoder import fused_decoder
from export.modules.fused_encoder import fused_encoder
from export.modules.image_decoder import ImageDecoder
from export.modules.merged import merge_projections
from export.modules.prompt_encoder import PromptEncoder
from export.onnx import GraphLimits, export_program
from export.packages import prepare_weights
from export.spec import Component, Precision, component_specs
from tests.conftest import CHECKPOINT, ROOT

triton_kernels = pytest.importorskip("export.kernels.triton_kernels")  # where Triton is


@pytest.fixture
def encoder() -> PromptEncoder:
    (module,) = load_components(
        CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=[Component.PROMPT_ENCODER]
    ).values()
    assert isinstance(module, PromptEncoder)
    return module


def test_the_kernels_compute_what_their_references_say() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.export.interpreted_kernels"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 36
    # The interpreter cuts where hardware rounds, so bf16 is off by up to a whole digit; and in FP8 it halves what would
    # be rounded up to a power of two.
    limits = {"fp8": 0.1, "bfloat16": 1e-2, "image decoder": 1e-5, "float32": 1e-6}
    accepted = {name: next(limit for kind, limit in limits.items() if kind in name) for name in errors}
    assert {name: e for name, e in errors.items() if not e <= accepted[name]} == {}


def test_nothing_holds_what_is_merged_when_its_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    (module,) = load_components(
        CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=[Component.DENOISER]
    ).values()
    layers: Foreign = module.layers
    replaced = [weakref.ref(layer.attention.to_q.weight) for layer in layers]
    alive = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(sum(r() is not None for r in replaced)))
    prepare_weights(module, {"layers.0.attention.qkv"})
    assert alive[-1] == 0
    assert len(set(alive)) == len(replaced) + 1  # block by block


@pytest.mark.parametrize("component", [Component.PROMPT_ENCODER, Component.DENOISER])
def test_merged_projections_share_memory_with_those_they_replace(component: Component) -> None:
    (module,) = load_components(CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=[component]).values()
    assert isinstance(module, PromptEncoder | Denoiser)
    before = {name: p.clone() for name, p in module.named_parameters()}
    merge_projections(module)
    merge_projections(module)
    after = dict(module.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    blocks = module.layers if isinstance(module, PromptEncoder) else [*module.layers, *module.noise_refiner]  # type: ignore[misc]
    assert len(after.keys() - before.keys()) == 2 * len(blocks)
    for block in blocks:
        encodes = component is Component.PROMPT_ENCODER
        attention, first = (block.self_attn, "q_proj") if encodes else (block.attention, "to_q")
        attention.qkv[0, 0] = 7.0
        assert getattr(attention, first).weight[0, 0] == 7.0
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in after.values()}
    assert sum(storages.values()) == sum(p.nbytes for p in before.values())


def test_the_fused_prompt_encoder_is_traced_with_one_product_and_one_kernel_where_there_were_more(
    encoder: PromptEncoder,
) -> None:
    """That it encodes the same is among the kernels' errors above."""
    dimensions = open_checkpoint(CHECKPOINT).dimensions
    spec = component_specs(dimensions)[Component.PROMPT_ENCODER]
    program = export_program(fused_encoder(encoder), spec, dimensions, GraphLimits(max_rows=4, max_size=512))
    merged = {name for name in program.state_dict if name.endswith((".qkv", ".gate_up"))}
    assert len(merged) == 2 * len(encoder.layers)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.zserve.norm_rotate_halves.default) == len(encoder.layers)


def test_a_prompt_encoders_layer_with_a_bias_stays_as_it_is(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "norm_rotate_halves", reference.norm_rotate_halves)
    projection: Foreign = encoder.layers[0].self_attn.q_proj  # type: ignore[union-attr]
    projection.bias = torch.nn.Parameter(torch.ones(projection.out_features), requires_grad=False)
    ids, lengths = torch.arange(64).unsqueeze(0), torch.tensor([64])
    with torch.inference_mode():
        expected = encoder(ids, lengths)
        got = fused_encoder(encoder)(ids, lengths)
    assert float((got - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "head_dim", "there", "suits"),
    [
        (torch.bfloat16, 128, True, True),
        (torch.bfloat16, 512, True, False),
        (torch.float32, 128, True, False),
        (torch.bfloat16, 128, False, False),
    ],
)
def test_the_attention_of_a_library_is_asked_for_where_it_is_and_for_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, there: bool, suits: bool
) -> None:
    monkeypatch.setattr(attention, "is_there", lambda device: there)
    assert attention.suits(torch.empty(1, 5, 2, head_dim, dtype=dtype)) is suits


def test_the_fused_image_decoder_is_traced_for_all_sizes_with_the_weights_that_are_there() -> None:
    """That it draws the same is among the kernels' errors above: they run in a process of their own."""
    dimensions = open_checkpoint(CHECKPOINT).dimensions
    spec = component_specs(dimensions)[Component.IMAGE_DECODER]
    modules = load_components(CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=[Component.IMAGE_DECODER])
    decoder = modules[Component.IMAGE_DECODER]
    assert isinstance(decoder, ImageDecoder)
    form = fused_decoder(decoder)
    lent = dict(decoder.named_parameters())
    assert all(parameter is lent.pop(name) for name, parameter in form.named_parameters()) and not lent
    program = export_program(form, spec, dimensions, GraphLimits(max_rows=4, max_size=512))
    targets = [node.target for node in program.graph.nodes]
    # No map is doubled before it is convolved, and none is laid out anew but the one after the first convolution.
    assert torch.ops.aten.upsample_nearest2d.vec not in targets
    assert torch.ops.aten.group_norm.default not in targets
    assert targets.count(torch.ops.aten.contiguous.default) + targets.count(torch.ops.aten.clone.default) <= 1
