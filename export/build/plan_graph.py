"""What TensorRT needs of a graph beyond ONNX. Values do not change."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

WIDEST_FUSED_HEAD = 256


@dataclass(frozen=True)
class Attention:
    """Attention nodes of a graph, by how TensorRT is to run them."""

    fused: int
    decomposed: int


def fit_for_tensorrt(model: "ir.Model") -> Attention:
    """Makes `model` buildable in place; returns how its attention will run."""
    nodes = [n for n in model.graph if n.op_type == "Attention"]
    decomposed = [n for n in nodes if not _has_fused_kernel(n)]
    for node in decomposed:
        _allow_decomposition(node)
    for node in list(model.graph):
        if node.op_type == "Resize":
            _resize_in_fp32(model, node)
    _drop_metadata(model)
    return Attention(len(nodes) - len(decomposed), len(decomposed))


def _has_fused_kernel(attention: "ir.Node") -> bool:
    import onnx_ir as ir

    query = attention.inputs[0]
    assert query is not None
    assert query.shape is not None
    width = query.shape[-1]
    return query.dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16) and (
        isinstance(width, int) and width <= WIDEST_FUSED_HEAD
    )


def _allow_decomposition(attention: "ir.Node") -> None:
    """Without this attribute a build fails where no fused kernel fits, which ensures fused kernels elsewhere."""
    import onnx_ir as ir

    attention.attributes.add(ir.AttrInt64("TRT_decomposable", 1))


def _resize_in_fp32(model: "ir.Model", resize: "ir.Node") -> None:
    """TensorRT has no bf16 resize. This one repeats pixels, so the detour through fp32 is exact."""
    import onnx_ir as ir

    image, output = resize.inputs[0], resize.outputs[0]
    if image is None or image.dtype is not ir.DataType.BFLOAT16:
        return
    before = ir.node("Cast", [image], {"to": ir.DataType.FLOAT})
    after = ir.node("Cast", [output], {"to": ir.DataType.BFLOAT16})
    for cast, dtype, shape in ((before, ir.DataType.FLOAT, image.shape), (after, ir.DataType.BFLOAT16, output.shape)):
        cast.outputs[0].dtype, cast.outputs[0].shape = dtype, shape
    output.replace_all_uses_with(after.outputs[0])
    after.replace_input_with(0, output)
    resize.replace_input_with(0, before.outputs[0])
    output.dtype = ir.DataType.FLOAT
    model.graph.insert_before(resize, before)
    model.graph.insert_after(resize, after)


def _drop_metadata(model: "ir.Model") -> None:
    """Drops the tracing machine's source lines and paths, which would make equal graphs differ."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
