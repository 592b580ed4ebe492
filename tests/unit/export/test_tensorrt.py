"""Real TensorRT-RTX plans, built on whatever machine this is; nothing here runs one."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import onnxruntime
import pytest
import tensorrt_rtx
import torch
from safetensors.torch import load_file, save_file

from export import validity
from export.build import BuildInputs, BuildOptions, builder_for, tensorrt
from export.build.plan_graph import fit_for_tensorrt
from export.build.shared_plans import find_plan
from export.build.tensorrt import TensorRtBuilder
from export.checkpoint import data_start, open_checkpoint
from export.errors import BuildError, CheckpointError, UnsupportedError
from export.manifest import FILE_NAME, Backend, EngineRecord, Manifest, PlanWeights, Target, content_digest
from export.modules import load_components
from export.modules.image_decoder import ATTENTION_SLICES
from export.onnx import GraphLimits, GraphSource, outline_graph
from export.profiles import serving_profiles
from export.repository import versions
from export.spec import Component, ComponentSpec, DType, Precision, ShapePoint, component_specs, example_inputs
from tests.conftest import CHECKPOINT, MODEL

TARGETS = (Target("cuda", "8.9"), Target("cuda", "12.0"))
DEMO = open_checkpoint(CHECKPOINT)
SPECS = component_specs(DEMO.dimensions)
LIMITS = GraphLimits(8, 1024)


@pytest.fixture(scope="module")
def exported(tensorrt_repository: Path) -> tuple[Path, Manifest]:
    folder = tensorrt_repository / MODEL / str(versions(tensorrt_repository / MODEL)[-1])
    return folder, Manifest.read(folder)


def engine(manifest: Manifest, component: Component) -> EngineRecord:
    record = manifest.engine(component)
    assert record is not None
    return record


@pytest.mark.parametrize("component", list(Component))
def test_a_plan_is_built_for_every_gpu_it_was_asked_for(exported: tuple[Path, Manifest], component: Component) -> None:
    folder, manifest = exported
    record = engine(manifest, component)
    assert record.backend is Backend.TENSORRT_RTX
    assert record.built_for == TARGETS
    plan = (folder / record.file).read_bytes()
    assert plan[:4] == b"vtrt"
    # The plan's own word for it.
    assert b"sm89 sm120 " in re.findall(rb"accelerators=\{([^}]*)\}", plan)
    assert record.parity is None, "no such GPU is here, so nothing may be claimed"


def attention_layers() -> tuple[int, int, int]:
    """Of each component, from the checkpoint's configs; the image decoder's has no fused kernel and no node."""
    transformer = json.loads((CHECKPOINT / "transformer" / "config.json").read_text())
    text = json.loads((CHECKPOINT / "text_encoder" / "config.json").read_text())
    refiners = transformer["n_refiner_layers"]
    return text["num_hidden_layers"] - 1 + refiners, transformer["n_layers"] + refiners, 0


def test_the_manifest_says_what_a_plan_is(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    assert manifest.precision is Precision.BF16
    for component, attention in zip(Component, attention_layers(), strict=True):
        plan = engine(manifest, component).plan
        assert plan is not None
        assert plan.profiles == serving_profiles((256, 256), 8, 2048)
        assert (plan.fused_attention, plan.decomposed_attention) == (attention, 0)
        assert plan.weights is PlanWeights.INSIDE
    # Graph and weights are only needed beside a plan that was stripped of them.
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".plan", ".plan", ".plan"]


def test_the_profiles_take_what_is_served() -> None:
    fixed, ranged = serving_profiles((1024, 768), 8, 2048)
    spec = SPECS[Component.DENOISER]

    def takes(point: ShapePoint) -> tuple[bool, bool]:
        shapes = spec.input_shapes(point)
        return fixed.takes(spec, shapes), ranged.takes(spec, shapes)

    assert takes(ShapePoint(1, 32, 768, 1024)) == (True, True)
    assert takes(ShapePoint(1, 512, 768, 1024)) == (True, True)
    assert takes(ShapePoint(1, 32, 1024, 768)) == (False, True)
    assert takes(ShapePoint(8, 512, 2048, 2048)) == (False, True)
    assert takes(ShapePoint(9, 32, 768, 1024)) == (False, False)
    assert takes(ShapePoint(1, 32, 2064, 64)) == (False, False)


@pytest.mark.parametrize("component", list(Component))
def test_a_graph_made_without_weights_is_the_component(component: Component, tmp_path: Path) -> None:
    spec, precision = SPECS[component], Precision.FP32
    source = GraphSource(CHECKPOINT, DEMO.dimensions, precision, LIMITS)
    outlined = outline_graph(source, spec)
    outlined.attach(source, tmp_path / "weights.safetensors")
    ir.save(outlined.model, tmp_path / "graph.onnx")
    assert (tmp_path / "graph.onnx").stat().st_size < 1 << 20, "the weights are beside it"
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    module = load_components(CHECKPOINT, precision=precision, device="cpu", wanted=[component])[component]
    # The second has a number of image tokens that is padded.
    for point in (ShapePoint(3, 64, 128, 256), ShapePoint(1, 96, 208, 144)):
        inputs = example_inputs(spec, point, DEMO.dimensions)
        got = torch.from_numpy(session.run(None, {name: t.numpy() for name, t in inputs.items()})[0]).double()
        expected = module(**inputs).double()
        assert (got - expected).norm() / expected.norm() <= spec.tolerance[precision]


def test_weights_of_another_shape_or_type_are_not_taken_for_the_graphs(tmp_path: Path) -> None:
    source = GraphSource(tmp_path, DEMO.dimensions, Precision.FP32, LIMITS)
    outlined = outline_graph(replace(source, checkpoint=CHECKPOINT), SPECS[Component.IMAGE_DECODER])
    shutil.copytree(CHECKPOINT / "vae", tmp_path / "vae")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    weights, key = load_file(file), "decoder.mid_block.attentions.0.to_q.weight"
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"].transpose(0, 1).contiguous()
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"vae: decoder.conv_in.weight has the shape .*; its config promises \["):
        outlined.attach(source, tmp_path / "weights.safetensors")
    weights = load_file(CHECKPOINT / "vae" / file.name)
    save_file({**weights, key: weights[key].double()}, file)
    with pytest.raises(CheckpointError, match=rf"vae: {key} is F64; F32, BF16, F16 are accepted"):
        outlined.attach(source, tmp_path / "weights.safetensors")


def inputs_of(spec: ComponentSpec, folder: Path) -> BuildInputs:
    return BuildInputs(
        GraphSource(CHECKPOINT, DEMO.dimensions, Precision.BF16, LIMITS),
        spec,
        serving_profiles((256, 256), 2, 512),
        folder,
        lambda: pytest.fail("a plan needs no weights in memory"),
    )


def test_the_image_decoder_attends_in_slices() -> None:
    source = GraphSource(CHECKPOINT, DEMO.dimensions, Precision.BF16, LIMITS)
    nodes = outline_graph(source, SPECS[Component.IMAGE_DECODER]).model.graph
    assert [node.op_type for node in nodes].count("Softmax") == ATTENTION_SLICES


def test_a_network_that_is_not_the_spec_is_refused(tmp_path: Path) -> None:
    spec = SPECS[Component.PROMPT_ENCODER]
    other = replace(spec, output=replace(spec.output, dtype=DType.INT64))
    builder = builder_for(Backend.TENSORRT_RTX, BuildOptions(TARGETS))
    assert builder is not None
    with pytest.raises(BuildError, match="its spec says"):
        builder.build(inputs_of(other, tmp_path), tmp_path)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image decoder's, with its weights beside it."""
    path = tmp_path_factory.mktemp("graph") / "image_decoder.onnx"
    spec = SPECS[Component.IMAGE_DECODER]
    source = inputs_of(spec, path.parent).source
    outlined = outline_graph(source, spec)
    outlined.attach(source, path.with_suffix(".safetensors"))
    fit_for_tensorrt(outlined.model)
    ir.save(outlined.model, path)
    return path


def write_plan(graph: Path, path: Path, report: Callable[[], None] = lambda: None) -> None:
    inputs = replace(inputs_of(SPECS[Component.IMAGE_DECODER], path.parent), report=report)
    TensorRtBuilder(Backend.TENSORRT_RTX, BuildOptions(TARGETS[:1])).write_plan(graph, inputs, path)


def test_a_plan_is_written_piece_by_piece_or_at_once(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(graph, tmp_path / "streamed.plan")
    streamed = (tmp_path / "streamed.plan").read_bytes()
    assert streamed[:4] == b"vtrt"
    whole = SimpleNamespace(build_serialized_network=lambda network, config: b"as a whole")
    with (tmp_path / "whole.plan").open("wb") as file:
        assert tensorrt._build(tensorrt_rtx, whole, (None, None), file)
    assert (tmp_path / "whole.plan").read_bytes() == b"as a whole"
    monkeypatch.delattr(tensorrt_rtx.Builder, "build_serialized_network")
    write_plan(graph, tmp_path / "again.plan")
    assert (tmp_path / "again.plan").stat().st_size == len(streamed), "it was never in memory as a whole"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is Linux's")
def test_a_plan_that_the_disk_has_no_room_for_is_an_error(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "image_decoder.plan").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_plan(graph, tmp_path / "image_decoder.plan")


def test_a_build_ends_when_it_is_interrupted(graph: Path, tmp_path: Path) -> None:
    calls = itertools.count()

    def report() -> None:
        if next(calls) >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(graph, tmp_path / "image_decoder.plan", report)
    assert next(calls) < 50, "of the hundreds of steps that the build has"


def test_a_build_without_memory_is_no_fault_of_the_model(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> bool:
        log = tensorrt.logger(tensorrt_rtx)
        log.log(tensorrt_rtx.ILogger.Severity.ERROR, said)
        return False

    monkeypatch.setattr(tensorrt, "_build", build)
    said = "Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)"
    with pytest.raises(torch.OutOfMemoryError, match="could not build image_decoder: Error Code 2"):
        write_plan(graph, tmp_path / "image_decoder.plan")
    said = "Error Code 10: Internal Error"
    with pytest.raises(BuildError, match="could not build image_decoder: Error Code 10"):
        write_plan(graph, tmp_path / "image_decoder.plan")


def test_plans_can_be_captured_as_cuda_graphs(tmp_path: Path) -> None:
    trt_builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger())
    inputs = inputs_of(SPECS[Component.DENOISER], tmp_path)
    config = TensorRtBuilder(Backend.TENSORRT_RTX, BuildOptions(TARGETS))._config(tensorrt_rtx, trt_builder, inputs)
    assert config.get_flag(tensorrt_rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is the answer of a machine without a GPU")
@pytest.mark.parametrize(
    ("version", "says"), [("10.14.1", "10.15 is the oldest that can"), ("11.2.0", "and this machine has none")]
)
def test_the_full_flavour_says_what_it_needs(version: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "import_flavour", lambda library: SimpleNamespace(__version__=version))
    builder = builder_for(Backend.TENSORRT, BuildOptions(TARGETS[:1]))
    assert builder is not None
    with pytest.raises(UnsupportedError, match=says):
        builder.check(Precision.BF16)


def test_the_full_flavour_has_no_bf16_for_turing(monkeypatch: pytest.MonkeyPatch) -> None:
    turing = Target("cuda", "7.5")
    monkeypatch.setattr(tensorrt, "import_flavour", lambda library: SimpleNamespace(__version__="11.2.0"))
    monkeypatch.setattr(tensorrt, "current_target", lambda device: turing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    builder = builder_for(Backend.TENSORRT, BuildOptions((turing,)))
    assert builder is not None
    builder.check(Precision.FP32)
    with pytest.raises(UnsupportedError, match=r"no bf16 for .* 7\.5.*; give --precision fp32"):
        builder.check(Precision.BF16)


def test_the_full_flavour_builds_for_the_model_of_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Target("cuda", "9.0", model="NVIDIA H100")
    monkeypatch.setattr(tensorrt, "import_flavour", lambda library: SimpleNamespace(__version__="11.2.0"))
    monkeypatch.setattr(tensorrt, "current_target", lambda device: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    TensorRtBuilder(Backend.TENSORRT, BuildOptions((here,))).check(Precision.BF16)
    with pytest.raises(UnsupportedError, match="leave --target out"):  # which does not name the model
        TensorRtBuilder(Backend.TENSORRT, BuildOptions((replace(here, model=None),))).check(Precision.BF16)


def test_plans_without_weights_need_a_gpu_that_is_not_here() -> None:
    builder = builder_for(Backend.TENSORRT_RTX, BuildOptions(TARGETS, PlanWeights.STRIPPED))
    assert builder is not None
    with pytest.raises(UnsupportedError, match="one target and on a machine with a GPU only"):
        builder.check(Precision.BF16)


class TimingConfig:
    """A builder's configuration on a GPU that `good` was measured on."""

    def __init__(self) -> None:
        self.tried: list[bytes] = []

    def create_timing_cache(self, measured: bytes) -> bytes:
        return measured

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch, "another GPU's measurements would choose the wrong kernels"
        self.tried.append(cache)
        return cache in (b"", b"good")


@pytest.mark.parametrize(("kept", "used"), [(None, b""), (b"good", b"good"), (b"of another GPU", b"")])
def test_what_an_earlier_build_measured_is_used_where_it_holds(tmp_path: Path, kept: bytes | None, used: bytes) -> None:
    config, file = TimingConfig(), tmp_path / tensorrt.TIMING_CACHE
    if kept is not None:
        file.write_bytes(kept)
    tensorrt._use_timing_cache(config, file)
    assert config.tried[-1] == used


def test_fine_tunes_share_a_plan_that_is_equal_and_whole(
    exported: tuple[Path, Manifest], tensorrt_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = exported
    plan = engine(manifest, Component.DENOISER).plan
    assert plan is not None
    shared = find_plan(tensorrt_repository, Backend.TENSORRT_RTX, plan, TARGETS)
    assert shared is not None
    assert shared.name == "denoiser.plan"
    assert find_plan(tensorrt_repository, Backend.TENSORRT, plan, TARGETS) is None
    assert find_plan(tensorrt_repository, Backend.TENSORRT_RTX, plan, TARGETS[:1]) is None
    assert find_plan(tensorrt_repository, Backend.TENSORRT_RTX, replace(plan, graph="another"), TARGETS) is None
    copy = tmp_path / "m" / "1"
    shutil.copytree(folder, copy)
    assert find_plan(tmp_path, Backend.TENSORRT_RTX, plan, TARGETS) is not None
    told = json.loads((copy / FILE_NAME).read_text())
    for target in (target for record in told["engines"] for target in record["built_for"]):
        target["model"] = "NVIDIA L4"
    same, other = (tuple(replace(target, model=model) for target in TARGETS) for model in ("NVIDIA L4", "NVIDIA L40"))
    monkeypatch.setitem(validity.BINDING_LIBRARIES, Backend.TENSORRT, ("tensorrt_rtx",))
    native = [record | {"backend": "tensorrt"} for record in told["engines"]]
    (copy / FILE_NAME).write_text(json.dumps(told | {"engines": native}))
    assert find_plan(tmp_path, Backend.TENSORRT, plan, same) is not None
    assert find_plan(tmp_path, Backend.TENSORRT, plan, other) is None, "it was built on another model of GPU"
    (copy / FILE_NAME).write_text(json.dumps(told | {"source": "of an earlier zserve"}))
    assert find_plan(tmp_path, Backend.TENSORRT_RTX, plan, TARGETS) is None
    (copy / FILE_NAME).write_text(json.dumps(told))
    (copy / "denoiser.plan").write_bytes(b"damaged")
    assert find_plan(tmp_path, Backend.TENSORRT_RTX, plan, TARGETS) is None


def test_a_graph_does_not_depend_on_its_weights(tmp_path: Path) -> None:
    checkpoint = tmp_path / "fine-tune"
    shutil.copytree(CHECKPOINT, checkpoint)
    weights = checkpoint / "text_encoder" / "model.safetensors"
    with weights.open("r+b") as f:
        f.seek(data_start(weights))
        f.write(bytes(4096))
    hashes = []
    for number, source in enumerate((CHECKPOINT, checkpoint)):
        folder = tmp_path / str(number)
        folder.mkdir()
        graph = GraphSource(source, DEMO.dimensions, Precision.BF16, LIMITS)
        outlined = outline_graph(graph, SPECS[Component.PROMPT_ENCODER])
        outlined.attach(graph, folder / "weights.safetensors")
        fit_for_tensorrt(outlined.model)
        ir.save(outlined.model, folder / "graph.onnx")
        hashes.append((content_digest(folder / "graph.onnx"), content_digest(folder / "weights.safetensors")))
    assert hashes[0][0] == hashes[1][0], "one plan serves both"
    assert hashes[0][1] != hashes[1][1]


def attention_graph(dtype: ir.DataType, head: int) -> ir.Model:
    """One attention node over 3 heads of width `head`."""
    qkv = [ir.val(name, dtype=dtype, shape=ir.Shape(["batch", 3, 64, head])) for name in "qkv"]
    node = ir.node("Attention", qkv)
    return ir.Model(ir.Graph(qkv, node.outputs, nodes=[node], opset_imports={"": 23}), ir_version=10)


@pytest.mark.parametrize(
    ("dtype", "head", "fused"),
    [
        (ir.DataType.BFLOAT16, 128, True),
        (ir.DataType.BFLOAT16, 256, True),
        (ir.DataType.BFLOAT16, 512, False),
        (ir.DataType.FLOAT, 64, False),
    ],
)
def test_only_attention_without_a_fused_kernel_may_be_decomposed(dtype: ir.DataType, head: int, fused: bool) -> None:
    model = attention_graph(dtype, head)
    attention = fit_for_tensorrt(model)
    assert (attention.fused, attention.decomposed) == ((1, 0) if fused else (0, 1))
    assert ("TRT_decomposable" in model.graph[0].attributes) is not fused


def test_bf16_is_resized_in_fp32(tmp_path: Path) -> None:
    image = ir.val("image", dtype=ir.DataType.BFLOAT16, shape=ir.Shape([1, 1, 2, 2]))
    scales = ir.val("scales", const_value=ir.tensor([1.0, 1.0, 2.0, 2.0], name="scales"))
    resize = ir.node("Resize", [image, None, scales], {"mode": "nearest"})
    resize.outputs[0].dtype = ir.DataType.BFLOAT16
    wide = ir.node("Cast", [resize.outputs[0]], {"to": ir.DataType.FLOAT})
    graph = ir.Graph([image], wide.outputs, nodes=[resize, wide], initializers=[scales], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    fit_for_tensorrt(model)
    assert [n.op_type for n in model.graph] == ["Cast", "Resize", "Cast", "Cast"]
    assert resize.inputs[0] is not image
    assert resize.outputs[0].dtype is ir.DataType.FLOAT
