"""What of the TensorRT engine can be seen without a GPU: its buffers, its scratch memory, its refusals.

TensorRT's own objects are mocks of the installed binding's classes, which have no methods that the binding has not.
"""

from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import MagicMock, create_autospec

import pytest
import tensorrt_rtx
import torch

from export import plans
from export.errors import PlanError
from export.manifest import Backend, EngineRecord, FileRecord, PlanRecord, PlanWeights, Target, Verbosity
from export.plans import OpenPlan, bind, described
from export.profiles import serving_profiles
from export.spec import Component, ModelDimensions, ShapePoint, component_specs, example_inputs
from server.engines.recorded import CudaRecorder
from server.engines.tensorrt import RecordedCall, Scratch, TensorRtEngine
from server.engines.tensorrt_runtime import CompiledKernels, TensorRtPlan
from server.errors import EngineLoadError

DIMENSIONS = ModelDimensions(latent_channels=4, caption_dim=8, vocabulary=10)
SPEC = component_specs(DIMENSIONS)[Component.DENOISER]
CPU = torch.device("cpu")


@dataclass
class FakeContext:
    """An execution context as far as the engine tells it things."""

    scratch_bytes: int = 64
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    memory: tuple[int, int] = (0, 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= 8

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["latents"]

    def update_device_memory_size_for_shapes(self) -> int:
        return self.scratch_bytes

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)


class FakeGraph:
    """Counts its replays."""

    def __init__(self) -> None:
        self.replayed = 0

    def replay(self) -> None:
        self.replayed += 1


@dataclass
class FakePlan:
    """Counts its calls; records them as `graph`."""

    graph: FakeGraph | None = None
    made: list[FakeContext] = field(default_factory=list)
    executed: int = 0
    kept: int = 0

    def context_in(self, profile: int) -> FakeContext:
        self.made.append(FakeContext())
        return self.made[-1]

    def execute(self, context: FakeContext) -> None:
        self.executed += 1

    def record(self, context: FakeContext) -> FakeGraph | None:
        return self.graph

    def keep_compiled(self) -> None:
        self.kept += 1


def test_scratch_memory_is_shared_and_moves_only_to_grow() -> None:
    scratch = Scratch(CPU)
    small, large = FakeContext(100), FakeContext(1000)
    first = scratch.lend(small)
    assert scratch.lend(small) == first
    grown = scratch.lend(large)
    assert grown != first
    assert scratch.lend(small) == grown
    assert small.memory == large.memory
    assert large.memory[1] == 1000


def test_what_was_recorded_is_recorded_again_after_scratch_memory_could_not_grow() -> None:
    """For what it computed in was given back first."""
    inputs = example_inputs(SPEC, ShapePoint(1, 32, 64, 64), DIMENSIONS)
    plan, scratch = FakePlan(FakeGraph()), Scratch(CPU)
    call = RecordedCall(plan, scratch, SPEC, inputs)  # type: ignore[arg-type]
    plan.made[0].scratch_bytes = 100
    call(inputs)
    with pytest.raises(RuntimeError, match="allocate"):
        scratch.lend(FakeContext(1 << 60))
    call(inputs)
    assert plan.executed == 2
    assert plan.made[0].memory[1] == 100


def test_a_shape_keeps_its_buffers_and_gives_out_copies() -> None:
    inputs = example_inputs(SPEC, ShapePoint(1, 32, 64, 64), DIMENSIONS)
    plan = FakePlan()
    call = RecordedCall(plan, Scratch(CPU), SPEC, inputs)  # type: ignore[arg-type]
    (context,) = plan.made
    assert context.shapes == {name: tuple(t.shape) for name, t in inputs.items()}
    before = dict(context.addresses)
    first, second = call(inputs), call(inputs)
    assert context.addresses == before, "a recorded graph reads and writes where it was recorded"
    assert first.data_ptr() != second.data_ptr(), "a caller may keep an output while the next call runs"
    assert (plan.executed, plan.kept) == (2, 1)


def test_a_recorded_call_is_replayed_until_its_scratch_memory_moves() -> None:
    inputs = example_inputs(SPEC, ShapePoint(1, 32, 64, 64), DIMENSIONS)
    plan, scratch = FakePlan(FakeGraph()), Scratch(CPU)
    call = RecordedCall(plan, scratch, SPEC, inputs)  # type: ignore[arg-type]
    for _ in range(3):
        call(inputs)
    assert plan.graph is not None
    assert (plan.executed, plan.graph.replayed) == (1, 2)
    scratch.lend(FakeContext(1000))
    call(inputs)
    call(inputs)
    assert (plan.executed, plan.graph.replayed) == (2, 3)
    assert plan.made[0].memory[1] == 1000


def test_a_refused_shape_is_named() -> None:
    inputs = example_inputs(SPEC, ShapePoint(9, 32, 64, 64), DIMENSIONS)
    with pytest.raises(PlanError, match="TensorRT refuses latents"):
        RecordedCall(FakePlan(), Scratch(CPU), SPEC, inputs)  # type: ignore[arg-type]


@pytest.fixture
def engine() -> MagicMock:
    """The denoiser's engine as the binding would present it."""
    tensors = [described(tensorrt_rtx, t) for t in (*SPEC.inputs, SPEC.output)]
    by_name = {name: (dtype, shape) for name, dtype, shape in tensors}
    engine: MagicMock = create_autospec(tensorrt_rtx.ICudaEngine, instance=True)
    engine.num_io_tensors = len(tensors)
    engine.refittable = False
    engine.get_tensor_name.side_effect = lambda i: tensors[i][0]
    engine.get_tensor_dtype.side_effect = lambda name: by_name[name][0]
    engine.get_tensor_shape.side_effect = lambda name: by_name[name][1]
    engine.create_runtime_config.side_effect = lambda: create_autospec(tensorrt_rtx.IRuntimeConfig, instance=True)
    return engine


@pytest.fixture
def trt(engine: MagicMock, monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """The binding, whose runtime hands out `engine`."""
    trt = MagicMock(wraps=tensorrt_rtx, spec=tensorrt_rtx)
    trt.ExecutionContextAllocationStrategy = tensorrt_rtx.ExecutionContextAllocationStrategy
    trt.DynamicShapesKernelSpecializationStrategy = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy
    trt.DataType = tensorrt_rtx.DataType
    trt.Runtime = create_autospec(tensorrt_rtx.Runtime)
    trt.Runtime.return_value.deserialize_cuda_engine.return_value = engine
    trt.Refitter, trt.OnnxParserRefitter = (
        create_autospec(kind) for kind in (tensorrt_rtx.Refitter, tensorrt_rtx.OnnxParserRefitter)
    )
    monkeypatch.setattr(plans, "logger", lambda trt: MagicMock(said=lambda: "its own words"))
    return trt


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "denoiser.plan"
    path.write_bytes(b"plan")
    return path


def test_a_plan_that_does_not_load_says_why(trt: MagicMock, plan_file: Path) -> None:
    trt.Runtime.return_value.deserialize_cuda_engine.return_value = None
    with pytest.raises(PlanError, match=r"denoiser\.plan: its own words"):
        OpenPlan(trt, plan_file, SPEC)


def test_a_plan_of_another_component_is_refused(trt: MagicMock, plan_file: Path) -> None:
    OpenPlan(trt, plan_file, SPEC)
    with pytest.raises(PlanError, match="image_decoder needs"):
        OpenPlan(trt, plan_file, component_specs(DIMENSIONS)[Component.IMAGE_DECODER])


def test_a_plan_without_weights_gets_those_beside_it(trt: MagicMock, engine: MagicMock, plan_file: Path) -> None:
    engine.refittable = True
    trt.OnnxParserRefitter.return_value.refit_from_file.return_value = True
    trt.Refitter.return_value.refit_cuda_engine.return_value = True
    OpenPlan(trt, plan_file, SPEC)
    trt.OnnxParserRefitter.return_value.refit_from_file.assert_called_once_with(str(plan_file.with_suffix(".onnx")))
    trt.Refitter.return_value.refit_cuda_engine.return_value = False
    with pytest.raises(PlanError, match="do not fit its plan"):
        OpenPlan(trt, plan_file, SPEC)


def test_compiled_kernels_are_kept_for_the_next_start(
    trt: MagicMock, engine: MagicMock, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    kernels = CompiledKernels(trt, engine, plan_file)
    strategy = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy
    chosen = [kernels.config(profile).dynamic_shapes_kernel_specialization_strategy for profile in (0, 1)]
    assert chosen == [strategy.EAGER, strategy.LAZY]
    cache = kernels.config(0).create_runtime_cache()
    for profile in (0, 1):
        kernels.config(profile).set_runtime_cache.assert_called_once_with(cache)
    cache.serialize.return_value = b"kernels"
    cache.deserialize.assert_not_called()
    kernels.keep()
    assert [p.name for p in plan_file.parent.iterdir() if p != plan_file] == ["denoiser.runtime_cache"]
    again = CompiledKernels(trt, engine, plan_file).config(0).create_runtime_cache()
    again.deserialize.assert_called_once_with(b"kernels")


@pytest.mark.parametrize("backend", [Backend.TENSORRT, Backend.TENSORRT_RTX])
def test_contexts_compute_in_lent_memory(
    trt: MagicMock, engine: MagicMock, plan_file: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    context = create_autospec(tensorrt_rtx.IExecutionContext, instance=True)
    engine.create_execution_context.return_value = context
    plan = TensorRtPlan(trt, plan_file, SPEC, backend, CudaRecorder(CPU))
    assert plan.context_in(1) is context
    user_managed = tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED
    (how,) = engine.create_execution_context.call_args.args
    if backend is Backend.TENSORRT:
        assert how is user_managed
    else:
        how.set_execution_context_allocation_strategy.assert_called_once_with(user_managed)
    assert context.set_optimization_profile_async.call_args.args[0] == 1


def test_the_binding_takes_what_is_bound() -> None:
    context = create_autospec(tensorrt_rtx.IExecutionContext, instance=True)
    context.get_tensor_shape.return_value = (1, 4, 8, 8)
    context.update_device_memory_size_for_shapes.return_value = 64
    inputs = example_inputs(SPEC, ShapePoint(1, 32, 64, 64), DIMENSIONS)
    assert bind(context, SPEC, inputs).dtype is torch.float32
    assert {call.args[0] for call in context.set_tensor_address.call_args_list} == {*inputs, SPEC.output.name}
    Scratch(CPU).lend(context)
    assert context.set_device_memory.call_args.args[1] == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is the answer of a machine without a GPU")
def test_without_a_gpu_the_plan_is_not_even_opened(tmp_path: Path) -> None:
    plan = PlanRecord(serving_profiles((256, 256), 8, 1024), PlanWeights.INSIDE, Verbosity.LAYER_NAMES, "", 0, 0)
    file, target = FileRecord("denoiser.plan", 0, ""), Target("cuda", "8.9")
    record = EngineRecord(Component.DENOISER, Backend.TENSORRT_RTX, (file,), {}, (target,), None, plan)
    with pytest.raises(EngineLoadError, match="tensorrt_rtx needs an NVIDIA GPU"):
        TensorRtEngine(tmp_path / "denoiser.plan", SPEC, record, CPU)
