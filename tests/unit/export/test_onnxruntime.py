"""ONNX files for ONNX Runtime: what is in them, and weights that do not fit into them."""

import shutil
from pathlib import Path

import onnx
import pytest
import torch
from torch.onnx import ONNXProgram

from export.build import BuildInputs, BuildOptions
from export.build.onnxruntime import OnnxRuntimeBuilder
from export.checkpoint import open_checkpoint
from export.modules import load_components
from export.modules.denoiser import Denoiser
from export.modules.rope import Rotation
from export.onnx import GraphLimits, GraphSource
from export.spec import Component, Precision, ShapePoint, component_specs, example_inputs
from tests.conftest import CHECKPOINT


def test_weights_that_torch_writes_beside_the_graph_belong_to_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does above 1.5 GB. A version keeps, checks and copies what is recorded, and nothing else."""
    save = ONNXProgram.save
    monkeypatch.setattr(ONNXProgram, "save", lambda program, path: save(program, path, external_data=True))
    dimensions = open_checkpoint(CHECKPOINT).dimensions
    spec = component_specs(dimensions)[Component.IMAGE_DECODER]
    (module,) = load_components(CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=[spec.component]).values()
    source = GraphSource(CHECKPOINT, dimensions, Precision.FP32, GraphLimits(8, 512))
    builder = OnnxRuntimeBuilder(BuildOptions())
    built = builder.build(BuildInputs(source, spec, (), tmp_path, lambda: module), tmp_path)

    taken = tmp_path / "taken"
    taken.mkdir()
    for file in built.files:
        shutil.copy(file, taken)
    inputs = example_inputs(spec, ShapePoint(1, 32, 64, 80), dimensions)
    got = builder.load(taken / built.files[0].name, module, spec)(inputs).double()
    with torch.inference_mode():
        expected = module(**inputs).double()
    assert (got - expected).norm() <= spec.tolerance[Precision.FP32] * expected.norm()


def test_queries_and_keys_are_rotated_by_one_operator_each(tmp_path: Path) -> None:
    """Where ONNX Runtime spends a kernel's start on each of ten small ones otherwise. The module stays as it was."""
    dimensions = open_checkpoint(CHECKPOINT).dimensions
    spec = component_specs(dimensions)[Component.DENOISER]
    (module,) = load_components(CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=[spec.component]).values()
    assert isinstance(module, Denoiser)
    source = GraphSource(CHECKPOINT, dimensions, Precision.FP32, GraphLimits(8, 512))
    builder = OnnxRuntimeBuilder(BuildOptions())
    built = builder.build(BuildInputs(source, spec, (), tmp_path, lambda: module), tmp_path)

    nodes = [node.op_type for node in onnx.load(built.files[0]).graph.node]
    assert nodes.count("RotaryEmbedding") == 2 * (len(module.layers) + len(module.noise_refiner))
    assert module.rope.kind is Rotation
    inputs = example_inputs(spec, ShapePoint(3, 64, 64, 112), dimensions)
    got = builder.load(built.files[0], module, spec)(inputs).double()
    with torch.inference_mode():
        expected = module(**inputs).double()
    assert (got - expected).norm() <= spec.tolerance[Precision.FP32] * expected.norm()
