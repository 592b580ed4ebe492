"""What of the TensorRT engine can be seen without a GPU: its buffers, its scratch memory, its refusals.

TensorRT's own objects are mocks of the installed binding's classes, which have no methods that the binding has not.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import MagicMock, create_autospec

import pytest
import tensorrt_rtx
import torch

from export import plans
from export.build.plan_runner import PlanRunner
from export.errors import PlanError
from export.manifest import Backend, EngineRecord, FileRecord, PlanRecord, PlanWeights, Target, Verbosity
from export.plans import OpenPlan, context_configs, described
from export.profiles import serving_profiles
from export.spec import Component, ModelDimensions, ShapePoint, component_specs, example_inputs
from server.engines.base import KeepsMemory
from server.engines.recorded import CudaRecorder, Graph
from server.engines.served import ServedComponent
from server.engines.tensorrt import RecordedCall, Scratch, TensorRtEngine
from server.engines.tensorrt_runtime import CompiledKernels, TensorRtPlan
from server.errors import EngineLoadError, EngineRunError
from server.frontend.versions import folder_mark

DIMENSIONS = ModelDimensions(latent_channels=4, caption_dim=8, vocabulary=10)
SPEC = component_specs(DIMENSIONS)[Component.DENOISER]
CPU = torch.device("cpu")
SCRATCH = torch.empty(1 << 10, dtype=torch.uint8)


@dataclass
class FakeContext:
    """An execution context as far as the engine tells it things."""

    scratch_bytes: int = 64
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    memory: tuple[int, int] = (0, 0)
    output: tuple[int, ...] = ()
    refuses: str = ""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= 8

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name != self.refuses

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.output or self.shapes["latents"]

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


class FakeLog:
    """TensorRT's, which has `errors` to tell."""

    def __init__(self, *errors: str) -> None:
        self.errors = errors

    def forget(self) -> None:
        """They are those of what comes next."""

    def said(self) -> str:
        return "; ".join(self.errors)


class FakePlan(TensorRtPlan):
    """Counts its calls; records them as `graph`."""

    def __init__(self, graph: FakeGraph | None = None, log: FakeLog | None = None) -> None:
        self.graph = graph
        self.log = log or FakeLog()
        self.made: list[FakeContext] = []
        self.executed = self.kept = self.tried = 0

    def most_memory_needed(self, profile: int) -> int:
        return 1 << 20

    def context_in(self, profile: int) -> FakeContext:
        self.made.append(FakeContext())
        return self.made[-1]

    def execute(self, context: FakeContext) -> None:
        self.executed += 1

    def record(self, context: FakeContext) -> Graph:
        self.tried += 1
        if self.graph is None:
            raise PlanError("not with this driver")
        return self.graph  # type: ignore[return-value]

    def keep_kernels(self) -> None:
        self.kept += 1

    def close(self) -> None:
        """There is nothing to free."""


def test_scratch_memory_is_shared_and_moves_only_to_grow() -> None:
    scratch = Scratch(FakePlan(), CPU)
    small, large = FakeContext(100), FakeContext(1000)
    scratch.lend(small)
    first = small.memory
    scratch.lend(small)
    assert small.memory == first
    scratch.lend(large)
    scratch.lend(small)
    assert small.memory == large.memory
    assert large.memory[1] == 1000


def test_a_shape_keeps_its_buffers_and_gives_out_copies() -> None:
    inputs = example_inputs(SPEC, ShapePoint(1, 32, 64, 64), DIMENSIONS)
    plan = FakePlan()
    call = RecordedCall(plan, SCRATCH, SPEC, inputs)
    (context,) = plan.made
    assert context.shapes == {name: tuple(t.shape) for name, t in inputs.items()}
    before = dict(context.addresses)
    first, second = call(inputs), call(inputs)
    assert context.addresses == before, "a recorded graph reads and writes where it was recorded"
    assert first.data_ptr() != second.data_ptr(), "a caller may keep an output while the next call runs"
    assert (plan.executed, plan.kept) == (2, 0), "no kernels are written while serving"


def test_a_recorded_call_is_replayed_whatever_runs_beside_it() -> None:
    """So is every other shape of its profile: all compute in memory that suffices for the largest, and never moves."""
    engine = BrokenEngine(RuntimeError())
    engine._plan = plan = FakePlan(FakeGraph())
    short, long = (example_inputs(SPEC, ShapePoint(1, caption, 256, 256), DIMENSIONS) for caption in (32, 512))
    larger = example_inputs(SPEC, ShapePoint(2, 32, 256, 256), DIMENSIONS)
    for inputs in (short, long, larger, short, long, short):
        engine.call(inputs)
    assert plan.graph is not None
    assert (plan.executed, plan.tried, plan.graph.replayed) == (3, 2, 3)
    of_short, of_long, _ = (context.memory for context in plan.made)
    assert of_short == of_long
    assert of_short[1] == 1 << 20  # of the profile, where one call needs 64
    engine.free_memory()
    engine.call(short)
    assert (plan.executed, plan.tried) == (4, 3)


def test_a_call_that_cannot_be_recorded_says_so_once_and_runs_plainly(caplog: pytest.LogCaptureFixture) -> None:
    inputs = example_inputs(SPEC, ShapePoint(1, 32, 64, 64), DIMENSIONS)
    plan = FakePlan()
    call = RecordedCall(plan, SCRATCH, SPEC, inputs)
    for _ in range(3):
        call(inputs)
    assert (plan.executed, plan.tried) == (3, 1)
    (record,) = caplog.records
    assert "denoiser: calls with latents (1, 4, 8, 8), " in record.message
    assert record.message.endswith("not with this driver")


def test_the_memory_of_a_profile_is_tensorrts_own_figure(trt: MagicMock, engine: MagicMock, plan_file: Path) -> None:
    plan = OpenPlan(trt, plan_file, SPEC, Backend.TENSORRT)
    engine.get_device_memory_size_for_profile_v2.side_effect = [1 << 30, 0, 0]
    with pytest.raises(PlanError, match="how much memory profile 1 needs: its own words"):
        [plan.most_memory_needed(profile) for profile in (0, 1)]
    plan.log = FakeLog()
    assert plan.most_memory_needed(1) == plans.SMALLEST_SCRATCH, "a 0 without an error"
    assert [call.args for call in engine.get_device_memory_size_for_profile_v2.call_args_list] == [(0,), (1,), (1,)]


def test_tensorrt_rtx_is_asked_whether_a_call_can_be_captured(
    trt: MagicMock, engine: MagicMock, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = MagicMock(spec=CudaRecorder)
    context = create_autospec(tensorrt_rtx.IExecutionContext, instance=True)
    context.is_stream_capturable.return_value = False
    plan = TensorRtPlan(trt, plan_file, SPEC, Backend.TENSORRT_RTX, recorder)
    with pytest.raises(PlanError, match="cannot be captured"):
        plan.record(context)
    recorder.assert_not_called()


def test_a_refused_shape_is_named() -> None:
    inputs = example_inputs(SPEC, ShapePoint(9, 32, 64, 64), DIMENSIONS)
    with pytest.raises(PlanError, match="TensorRT refuses latents"):
        RecordedCall(FakePlan(), SCRATCH, SPEC, inputs)


def test_what_tensorrt_refuses_is_told_with_its_own_words() -> None:
    inputs = example_inputs(SPEC, ShapePoint(1, 32, 64, 64), DIMENSIONS)
    plan = FakePlan(log=FakeLog("its own words"))
    with pytest.raises(PlanError, match="does not take the buffer of caption: its own words"):
        plan.bind(FakeContext(refuses="caption"), SPEC, inputs)
    with pytest.raises(PlanError, match=r"does not know the shape of velocity, and has \(1, -1\): its own words"):
        plan.bind(FakeContext(output=(1, -1)), SPEC, inputs)
    with pytest.raises(PlanError, match="how much memory a call needs: its own words"):
        plan.memory_needed(FakeContext(scratch_bytes=0))
    assert FakePlan().memory_needed(FakeContext(scratch_bytes=0)) == plans.SMALLEST_SCRATCH, "no address is 0"


@pytest.mark.parametrize(
    "said",
    [
        "Error Code 1: Cuda Runtime (out of memory)",
        "[virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory (no further information)",
        "Requested amount of GPU memory (4294967296 bytes) could not be allocated.",
    ],
)
def test_memory_that_tensorrt_did_not_get_is_no_fault_of_its_plan(
    trt: MagicMock, engine: MagicMock, plan_file: Path, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = OpenPlan(trt, plan_file, SPEC, Backend.TENSORRT)
    engine.create_execution_context.return_value = None
    with pytest.raises(PlanError, match="execution context: its own words"):
        plan.context_in(0)
    plan.log = FakeLog(said)
    with pytest.raises(torch.OutOfMemoryError, match="execution context: "):
        plan.context_in(0)
    monkeypatch.setattr(plans, "logger", lambda trt: FakeLog(said))
    engine.refittable = True
    trt.OnnxParserRefitter.return_value.refit_from_file.return_value = False
    with pytest.raises(torch.OutOfMemoryError, match="the weights beside"):
        OpenPlan(trt, plan_file, SPEC, Backend.TENSORRT)
    trt.Runtime.return_value.deserialize_cuda_engine.return_value = None
    with pytest.raises(torch.OutOfMemoryError, match="cannot load"):
        OpenPlan(trt, plan_file, SPEC, Backend.TENSORRT)


def test_the_log_keeps_the_errors_of_one_operation() -> None:
    log = plans.logger(tensorrt_rtx)
    severity = tensorrt_rtx.ILogger.Severity
    log.forget()
    log.log(severity.WARNING, "a warning")
    assert log.said() == "it gave no reason"
    log.log(severity.WARNING, "4 bytes could not be allocated")
    assert log.said() == "4 bytes could not be allocated"
    for number in range(20):
        log.log(severity.ERROR, f"error {number}")
    assert log.said() == "; ".join(f"error {number}" for number in range(12, 20))
    log.forget()
    assert log.said() == "it gave no reason"


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
    monkeypatch.setattr(plans, "logger", lambda trt: FakeLog("its own words"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 20, 8 << 20))
    return trt


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "denoiser.plan"
    path.write_bytes(b"plan")
    return path


def test_a_plan_that_does_not_load_says_why(trt: MagicMock, plan_file: Path) -> None:
    trt.Runtime.return_value.deserialize_cuda_engine.return_value = None
    with pytest.raises(PlanError, match=r"denoiser\.plan \(0 MiB; 3 MiB .* were free\): its own words"):
        OpenPlan(trt, plan_file, SPEC, Backend.TENSORRT)
    with plan_file.with_suffix(".safetensors").open("wb") as weights:  # of a plan without its own
        weights.truncate(5 << 20)
    with pytest.raises(PlanError, match=r"denoiser\.plan \(5 MiB; 3 MiB of device memory were free\)"):
        OpenPlan(trt, plan_file, SPEC, Backend.TENSORRT)


def test_a_plan_of_another_component_is_refused(trt: MagicMock, plan_file: Path) -> None:
    OpenPlan(trt, plan_file, SPEC, Backend.TENSORRT)
    with pytest.raises(PlanError, match="image_decoder needs"):
        OpenPlan(trt, plan_file, component_specs(DIMENSIONS)[Component.IMAGE_DECODER], Backend.TENSORRT)


def test_a_plan_without_weights_gets_those_beside_it(trt: MagicMock, engine: MagicMock, plan_file: Path) -> None:
    engine.refittable = True
    trt.OnnxParserRefitter.return_value.refit_from_file.return_value = True
    trt.Refitter.return_value.refit_cuda_engine.return_value = True
    OpenPlan(trt, plan_file, SPEC, Backend.TENSORRT)
    trt.OnnxParserRefitter.return_value.refit_from_file.assert_called_once_with(str(plan_file.with_suffix(".onnx")))
    trt.Refitter.return_value.refit_cuda_engine.return_value = False
    with pytest.raises(PlanError, match="do not fit its plan"):
        OpenPlan(trt, plan_file, SPEC, Backend.TENSORRT)


def test_compiled_kernels_are_kept_for_the_next_start(
    trt: MagicMock, engine: MagicMock, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("kernels are on the host"))
    configs = context_configs(trt, engine, Backend.TENSORRT_RTX)
    kernels = CompiledKernels(configs, plan_file)
    cache = configs[0].create_runtime_cache()
    for config in configs:
        config.set_runtime_cache.assert_called_once_with(cache)
    cache.serialize.return_value = b"kernels"
    cache.deserialize.assert_not_called()
    kernels.keep()
    assert [p.name for p in plan_file.parent.iterdir() if p != plan_file] == [".denoiser.runtime_cache"]
    configs = context_configs(trt, engine, Backend.TENSORRT_RTX)
    again = CompiledKernels(configs, plan_file)
    cache = configs[0].create_runtime_cache()
    cache.deserialize.assert_called_once_with(b"kernels")
    cache.serialize.return_value = b"kernels"
    written = (plan_file.parent / ".denoiser.runtime_cache").stat().st_mtime_ns
    again.keep()
    assert (plan_file.parent / ".denoiser.runtime_cache").stat().st_mtime_ns == written, "nothing was new"


def test_a_poll_of_the_repository_takes_kept_kernels_for_no_new_version(
    trt: MagicMock, engine: MagicMock, tmp_path: Path
) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    plan = tmp_path / "m" / "1" / "denoiser.plan"
    plan.write_bytes(b"plan")
    before = folder_mark(tmp_path / "m")
    configs = context_configs(trt, engine, Backend.TENSORRT_RTX)
    kernels = CompiledKernels(configs, plan)
    configs[0].create_runtime_cache().serialize.return_value = b"kernels"
    kernels.keep()
    assert len(list(plan.parent.iterdir())) == 2
    assert folder_mark(tmp_path / "m") == before


def test_kept_kernels_that_cannot_be_read_are_compiled_anew(trt: MagicMock, engine: MagicMock, plan_file: Path) -> None:
    (plan_file.parent / ".denoiser.runtime_cache").mkdir()
    configs = context_configs(trt, engine, Backend.TENSORRT_RTX)
    CompiledKernels(configs, plan_file)
    configs[0].create_runtime_cache().deserialize.assert_not_called()


@pytest.fixture
def context(engine: MagicMock, monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """The execution context that `engine` makes; there is no stream either."""
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    context: MagicMock = create_autospec(tensorrt_rtx.IExecutionContext, instance=True)
    context.get_tensor_shape.return_value = (1, 4, 32, 32)
    context.update_device_memory_size_for_shapes.return_value = 64
    engine.create_execution_context.return_value = context
    return context


@pytest.mark.parametrize("backend", [Backend.TENSORRT, Backend.TENSORRT_RTX])
def test_contexts_compute_in_lent_memory(
    trt: MagicMock, engine: MagicMock, context: MagicMock, plan_file: Path, backend: Backend
) -> None:
    plan = TensorRtPlan(trt, plan_file, SPEC, backend, CudaRecorder(CPU))
    assert plan.context_in(1) is context
    user_managed = tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED
    (how,) = engine.create_execution_context.call_args.args
    if backend is Backend.TENSORRT:
        assert how is user_managed
    else:
        how.set_execution_context_allocation_strategy.assert_called_once_with(user_managed)
    assert context.set_optimization_profile_async.call_args.args[0] == 1


@pytest.mark.usefixtures("context")
def test_the_exports_check_runs_the_kernels_that_are_served(
    trt: MagicMock, engine: MagicMock, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    points = {0: ShapePoint(1, 32, 256, 256), 1: ShapePoint(1, 32, 64, 64)}
    shapes = [SPEC.input_shapes(point) for point in points.values()]
    engine.num_optimization_profiles = len(points)
    engine.get_tensor_profile_shape.side_effect = lambda name, profile: [shapes[profile][name]] * 3
    run = PlanRunner(trt, plan_file, SPEC, Backend.TENSORRT_RTX)
    served = TensorRtPlan(trt, plan_file, SPEC, Backend.TENSORRT_RTX, CudaRecorder(CPU))
    strategies = []
    for profile, point in points.items():
        inputs = example_inputs(SPEC, point, DIMENSIONS)
        run(inputs)
        run(inputs)
        served.context_in(profile)
        made = [c.args[0] for c in engine.create_execution_context.call_args_list[-2:]]
        strategies.append([how.dynamic_shapes_kernel_specialization_strategy for how in made])
    kinds = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy
    assert strategies == [[kinds.EAGER] * 2, [kinds.LAZY] * 2]
    assert engine.create_execution_context.call_count == 4, "a context per profile, not per call"


def test_the_binding_takes_what_is_bound() -> None:
    context = create_autospec(tensorrt_rtx.IExecutionContext, instance=True)
    context.get_tensor_shape.return_value = (1, 4, 8, 8)
    context.update_device_memory_size_for_shapes.return_value = 64
    inputs = example_inputs(SPEC, ShapePoint(1, 32, 64, 64), DIMENSIONS)
    plan = FakePlan()
    assert plan.bind(context, SPEC, inputs).dtype is torch.float32
    assert {call.args[0] for call in context.set_tensor_address.call_args_list} == {*inputs, SPEC.output.name}
    Scratch(FakePlan(), CPU).lend(context)
    assert context.set_device_memory.call_args.args[1] == 64


class BrokenEngine(TensorRtEngine):
    """One on a stream that is none, whose calls end as `error` has it."""

    def __init__(self, error: Exception) -> None:
        self.backend = Backend.TENSORRT
        self._profiles, self._spec, self._device = serving_profiles((256, 256), 8, 1024), SPEC, CPU
        self._streams, self._recorded, self._plain = {0: MagicMock()}, {(): MagicMock()}, {0: MagicMock()}
        self._scratch, self._recorded_in = Scratch(FakePlan(), CPU), None
        self._error, self._held = error, 0

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise self._error

    def _run_plain(self, profile: int, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise self._error

    def call(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The call as it would be, on no stream."""
        profile = self._profile({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        assert profile is not None
        return super()._call(inputs) if profile == 0 else super()._run_plain(profile, inputs)


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: MagicMock(priority=0))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize("error", [PlanError("TensorRT failed"), RuntimeError("CUDA error: invalid argument")])
def test_whatever_fails_in_a_call_makes_it_eagers(error: Exception) -> None:
    inputs = example_inputs(SPEC, ShapePoint(1, 32, 256, 256), DIMENSIONS)
    with pytest.raises(EngineRunError, match=f"TensorRT failed: {error}"):
        BrokenEngine(error).run(inputs)


@pytest.mark.usefixtures("no_streams")
def test_for_want_of_memory_the_engine_gives_back_what_it_can_and_stays() -> None:
    inputs = example_inputs(SPEC, ShapePoint(1, 32, 256, 256), DIMENSIONS)
    engine = BrokenEngine(torch.OutOfMemoryError("no more"))
    engine._plan = FakePlan()
    engine._memory_of_recorded()
    engine._scratch.lend(FakeContext(100))
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        engine.run(inputs)
    assert isinstance(engine, KeepsMemory)
    engine.free_memory()
    assert (engine._recorded, engine._plain, engine._recorded_in) == ({}, {}, None)
    assert engine._scratch._buffer.numel() == 0


def test_what_was_compiled_is_kept_when_the_worker_says_so() -> None:
    engine = BrokenEngine(RuntimeError())
    plan = engine._plan = FakePlan()
    served = ServedComponent(SPEC, engine, lambda: engine)
    served.keep_kernels()
    assert plan.kept == 1
    served.close()
    assert plan.kept == 1, "an engine that has failed keeps nothing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is the answer of a machine without a GPU")
def test_without_a_gpu_the_plan_is_not_even_opened(tmp_path: Path) -> None:
    plan = PlanRecord(serving_profiles((256, 256), 8, 1024), PlanWeights.INSIDE, Verbosity.LAYER_NAMES, "", 0, 0)
    file, target = FileRecord("denoiser.plan", 0, ""), Target("cuda", "8.9")
    record = EngineRecord(Component.DENOISER, Backend.TENSORRT_RTX, (file,), {}, (target,), None, plan)
    with pytest.raises(EngineLoadError, match="tensorrt_rtx needs an NVIDIA GPU"):
        TensorRtEngine(tmp_path / "denoiser.plan", SPEC, record, CPU)
