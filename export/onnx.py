"""A component as an ONNX graph with the spec's names and dynamic dimensions."""

import logging
import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from export.modules.outline import Outline, outline_component
from export.spec import (
    EXPORT_EXAMPLE,
    ComponentSpec,
    ModelDimensions,
    Precision,
    ShapePoint,
    example_inputs,
)
from export.weights import Span, write_weights

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.onnx import ONNXProgram

LIBRARIES = ("onnx", "onnx-ir", "onnxscript")  # that graphs are made with, besides torch


@dataclass(frozen=True)
class GraphLimits:
    """How far the dynamic dimensions of a graph reach."""

    max_rows: int  # of a batch
    max_size: int  # pixels a side


def export_program(
    module: nn.Module,
    spec: ComponentSpec,
    dimensions: ModelDimensions,
    limits: GraphLimits,
    example: ShapePoint = EXPORT_EXAMPLE,
) -> torch.export.ExportedProgram:
    """torch.export of `module` with the spec's dimensions dynamic.

    `example` has no special sizes, like `EXPORT_EXAMPLE`.
    """
    inputs = tuple(example_inputs(spec, example, dimensions, device=next(module.parameters()).device).values())
    return _trace(module, inputs, spec, limits, nullcontext())


def export_outline(
    outline: Outline, spec: ComponentSpec, dimensions: ModelDimensions, limits: GraphLimits
) -> torch.export.ExportedProgram:
    """The same of a component without its weights."""
    examples = example_inputs(spec, EXPORT_EXAMPLE, dimensions)
    inputs = tuple(outline.mode.from_tensor(t) for t in examples.values())
    return _trace(outline.module, inputs, spec, limits, outline.mode)


def export_onnx(program: torch.export.ExportedProgram, spec: ComponentSpec, path: Path) -> None:
    """Writes `program` to `path` at the spec's opset: weights inside or, if they are too many, in `path`.data."""
    _convert(program, spec, optimize=True).save(path)


@dataclass(frozen=True)
class GraphSource:
    """What a graph is made from when its weights stay outside."""

    checkpoint: Path
    dimensions: ModelDimensions
    precision: Precision
    limits: GraphLimits


@dataclass(frozen=True)
class OutlineGraph:
    """A component's graph whose weights are still where the checkpoint has them."""

    model: "ir.Model"
    sources: dict[str, tuple[str, str]]  # of the weights, as `Outline.sources`

    def attach(self, source: GraphSource, weights: Path) -> None:
        """Writes the weights to `weights` and lets the graph refer to them; it has to be saved in that folder.

        Raises:
            CheckpointError: the checkpoint's weights are not those that the graph was made for.
        """
        shapes = {name: _shape(self.model.graph.initializers[name]) for name in self.sources}
        spans = write_weights(source.checkpoint, self.sources, shapes, source.precision, weights)
        _point_into(self.model, weights, spans)


def outline_graph(source: GraphSource, spec: ComponentSpec) -> OutlineGraph:
    """The component's graph, made without its weights in memory."""
    outline = outline_component(source.checkpoint, spec.component, source.precision)
    program = export_outline(outline, spec, source.dimensions, source.limits)
    model = _convert(program, spec, optimize=False).model
    _optimise(model, outline.sources)
    return OutlineGraph(model, outline.sources)


def _trace(
    module: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    spec: ComponentSpec,
    limits: GraphLimits,
    mode: AbstractContextManager[object],
) -> torch.export.ExportedProgram:
    shapes = spec.dynamic_shapes(limits.max_rows, limits.max_size)
    with mode, torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=shapes)


def _convert(program: torch.export.ExportedProgram, spec: ComponentSpec, *, optimize: bool) -> "ONNXProgram":
    with warnings.catch_warnings():
        # The exporter walks through deprecated parts of torch and onnxscript that we cannot choose.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # no torchvision
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=spec.onnx_opset,
            input_names=[t.name for t in spec.inputs],
            output_names=[spec.output.name],
            optimize=optimize,
            verbose=False,
        )
    assert converted is not None
    return converted


def _optimise(model: "ir.Model", weights: Collection[str]) -> None:
    """Folds what is constant. The weights are hidden meanwhile: the graph must not depend on their values.

    Not onnxscript's `optimize_ir`: its rewriting rules find next to nothing here, and one of them
    looks through the whole graph at every slice, which was half of the time that a large graph took.
    """
    import onnx_ir.passes.common as passes
    from onnx_ir.passes import Sequential
    from onnxscript.optimizer import fold_constants_ir

    for name in weights:
        model.graph.initializers[name].const_value = None
    logging.getLogger("onnx_ir.passes").setLevel(logging.ERROR)  # it warns of each hidden weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        passes.InlinePass()(model)
        fold_constants_ir(model, onnx_shape_inference=True)
        Sequential(
            passes.RemoveUnusedNodesPass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.DeduplicateInitializersPass(),
            passes.CommonSubexpressionEliminationPass(),
            passes.OutputFixPass(),
            passes.NameFixPass(),
        )(model)


def _shape(value: "ir.Value") -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(value.shape.numpy())


def _point_into(model: "ir.Model", weights: Path, spans: Mapping[str, Span]) -> None:
    import onnx_ir as ir

    for name, span in spans.items():
        value = model.graph.initializers[name]
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            weights.name, span.offset, span.length, value.dtype, shape=value.shape, name=name, base_dir=weights.parent
        )
