"""Falling back, at load and at run time, with the reason kept."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, create_autospec

import pytest
import torch

from export.devices import current_target
from export.errors import StaleEngineError
from export.manifest import Backend, Manifest, Target
from export.profiles import serving_profiles
from export.spec import Component, ModelDimensions, ShapePoint, component_specs, example_inputs
from export.validity import check_engine, cpu_instructions
from server.config import FallbackPolicy
from server.engines import aotinductor, memory, onnxruntime
from server.engines.aotinductor import AotInductorEngine
from server.engines.eager import EagerEngine, EagerModules
from server.engines.load import EngineLoader
from server.engines.onnxruntime import OnnxRuntimeEngine
from server.engines.recorded import CudaRecorder
from server.engines.served import ServedComponent
from server.errors import EngineLoadError, EngineRunError
from tests.conftest import CHECKPOINT, MODEL
from tests.fakes import FakeEngine, FakeGraph, FakeRecorder, raising

SPECS = component_specs(ModelDimensions(16, 192, 1024))
INPUTS = {"latents": torch.zeros(1, 16, 8, 8)}
PROFILE = serving_profiles((256, 256), 8, 512)[1]


def served(engine: FakeEngine, eager: FakeEngine) -> ServedComponent:
    return ServedComponent(SPECS[Component.IMAGE_DECODER], engine, lambda: eager)


def eager_engine() -> FakeEngine:
    return FakeEngine(lambda inputs: torch.ones(1), backend=Backend.EAGER)


class Threads(torch.nn.Module):
    def forward(self) -> torch.Tensor:
        return torch.tensor(torch.get_num_threads())


def test_eager_computes_with_its_own_threads_and_leaves_the_others_as_they_were() -> None:
    before = torch.get_num_threads()
    assert EagerEngine(Threads(), threads=before + 1).run({}).item() == before + 1
    assert EagerEngine(Threads()).run({}).item() == before
    assert torch.get_num_threads() == before


def test_a_good_engine_is_used_and_eager_is_never_made() -> None:
    engine = FakeEngine(lambda inputs: torch.zeros(1))

    def no_eager() -> FakeEngine:
        raise AssertionError("eager was made")

    component = ServedComponent(SPECS[Component.IMAGE_DECODER], engine, no_eager)
    output, use = component.run(INPUTS)
    assert output.item() == 0
    assert (use.backend, use.fallback_reason) == (Backend.ONNXRUNTIME, "")


def test_an_engine_that_fails_is_replaced_for_good_and_the_call_succeeds() -> None:
    engine, eager = FakeEngine(raising(EngineRunError("kaput"))), eager_engine()
    component = served(engine, eager)
    for _ in range(2):
        output, use = component.run(INPUTS)
        assert output.item() == 1
        assert (use.backend, use.fallback_reason) == (Backend.EAGER, "kaput")
    assert engine.calls == 1
    assert engine.closed
    assert component.use.fallback_reason == "kaput"


def test_a_failing_fallback_is_an_error_not_a_loop() -> None:
    broken = FakeEngine(raising(EngineRunError("eager too")), backend=Backend.EAGER)
    with pytest.raises(EngineRunError, match="eager too"):
        served(FakeEngine(raising(EngineRunError("kaput"))), broken).run(INPUTS)


def test_the_failed_engine_is_gone_before_eager_is_made_and_what_that_fails_with_is_told_once_more() -> None:
    """Both may not fit into the memory, or the checkpoint may be gone."""

    def make_eager() -> FakeEngine:
        assert engine.closed
        if (error := next(errors)) is not None:
            raise error
        return eager_engine()

    errors = iter([torch.OutOfMemoryError("full"), OSError("moved"), None])
    engine = FakeEngine(raising(EngineRunError("kaput")))
    component = ServedComponent(SPECS[Component.IMAGE_DECODER], engine, make_eager)
    with pytest.raises(torch.OutOfMemoryError):
        component.run(INPUTS)
    assert not component.compiled
    assert component.use.fallback_reason == "kaput"
    with pytest.raises(OSError, match="moved"):
        component.run(INPUTS)
    output, use = component.run(INPUTS)
    assert (output.item(), use.backend, use.fallback_reason) == (1, Backend.EAGER, "kaput")
    assert engine.calls == 1
    component.close()


@pytest.mark.parametrize(
    "said", ["[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried", "bad_alloc"]
)
def test_a_host_without_memory_is_not_the_engines_fault(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(torch.nn.Module):
        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(said)

    monkeypatch.setattr(aotinductor, "open_package", lambda path, module: lambda *inputs: Full()())
    monkeypatch.setattr(onnxruntime.onnxruntime, "InferenceSession", MagicMock())
    spec = SPECS[Component.IMAGE_DECODER]
    session = OnnxRuntimeEngine(Path("x.onnx"), spec, PROFILE, 1)
    session._session.run.side_effect = onnxruntime.ORT_ERRORS[0](said)
    for engine in (EagerEngine(Full()), AotInductorEngine(Path("x"), spec, PROFILE, torch.nn.Linear(1, 1), 1), session):
        with pytest.raises(torch.OutOfMemoryError):
            engine.run(INPUTS)


def test_out_of_memory_is_not_the_engines_fault() -> None:
    engine = FakeEngine(raising(torch.OutOfMemoryError("full")))
    component = served(engine, eager_engine())
    with pytest.raises(torch.OutOfMemoryError):
        component.run(INPUTS)
    assert component.use.backend is Backend.ONNXRUNTIME


def test_a_shape_the_engine_was_not_built_for_goes_to_eager_alone() -> None:
    engine = FakeEngine(lambda inputs: torch.zeros(1), accepts=lambda shapes: shapes["latents"][2] <= 8)
    component = served(engine, eager_engine())
    reasons = set()
    for side in (16, 32):
        output, use = component.run({"latents": torch.zeros(1, 16, side, side)})
        assert output.item() == 1
        reasons.add(use.fallback_reason)
    (reason,) = reasons  # a metric's label: clients choose sizes, and are not to make a series each
    assert "not built for" in reason
    output, use = component.run(INPUTS)
    assert (output.item(), use.fallback_reason) == (0, "")


@pytest.fixture(scope="module")
def exported(repository: Path) -> tuple[Path, Manifest]:
    folder = max((p for p in (repository / MODEL).iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    return folder, Manifest.read(folder)


def loader(folder: Path, manifest: Manifest, policy: FallbackPolicy = FallbackPolicy.EAGER) -> EngineLoader:
    modules = EagerModules(CHECKPOINT, manifest.precision, "cpu")
    return EngineLoader(folder, manifest, current_target("cpu"), modules, 1, policy)


@pytest.mark.parametrize("component", list(Component))
@pytest.mark.parametrize("point", [ShapePoint(1, 32, 128, 128), ShapePoint(3, 64, 144, 208)])
def test_the_compiled_engine_agrees_with_eager(
    exported: tuple[Path, Manifest], component: Component, point: ShapePoint
) -> None:
    folder, manifest = exported
    engine = loader(folder, manifest).load_all()[component]
    eager = loader(folder, dataclasses.replace(manifest, engines=())).load_all()[component]
    spec = SPECS[component]
    inputs = example_inputs(spec, point, manifest.checkpoint.dimensions, seed=5)
    (got, use), (expected, eager_use) = engine.run(inputs), eager.run(inputs)
    assert (use.backend, eager_use.backend) == (Backend.ONNXRUNTIME, Backend.EAGER)
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= spec.tolerance[manifest.precision]


def stale(manifest: Manifest, **changes: object) -> Manifest:
    engines = tuple(dataclasses.replace(e, **changes) for e in manifest.engines)  # type: ignore[arg-type]
    return dataclasses.replace(manifest, engines=engines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"built_with": {"onnxruntime": "0.1"}}, "was built with onnxruntime 0.1, this is"),
        ({"built_for": (Target("cuda", "9.0"),)}, r"was built for cuda \(compute capability 9.0\), this is cpu"),
        (
            {"instructions": ("avx4096", *cpu_instructions())},
            "for a CPU with avx4096, which this one does not have",
        ),
        ({"built_with": {"tensorrt_rtx": "0.1"}, "backend": Backend.TENSORRT_RTX}, "was built with tensorrt_rtx 0.1"),
        ({"built_with": {"tensorrt": "10.0"}, "backend": Backend.TENSORRT}, "tensorrt 10.0, which is not installed"),
        (
            {"built_with": {"torch": torch.__version__, "fa3-fwd": "0.0.0"}, "backend": Backend.AOTINDUCTOR},
            "fa3-fwd 0.0.0",
        ),
    ],
)
def test_a_stale_engine_is_named_with_the_command_that_rebuilds_it(
    exported: tuple[Path, Manifest], changes: dict[str, object], message: str
) -> None:
    folder, manifest = exported
    changed = stale(manifest, **changes)
    with pytest.raises(StaleEngineError, match=message) as caught:
        check_engine(changed.engines[0], folder, current_target("cpu"), "zserve export ...")
    assert str(caught.value).endswith("rebuild it: zserve export ...")
    use = loader(folder, changed).load_all()[Component.DENOISER].use
    assert use.backend is Backend.EAGER
    assert f"--name {MODEL} --backend {changed.engines[0].backend}" in use.fallback_reason
    with pytest.raises(EngineLoadError, match="--require-engine"):
        loader(folder, changed, FallbackPolicy.REFUSE).load_all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digest": "0" * 64}, "is damaged: the bytes of"),
        ({"bytes": 7}, "is damaged: 7 bytes of"),
        ({"name": "nothing.onnx"}, "nothing.onnx is missing"),
    ],
)
def test_every_file_of_an_engine_is_checked(
    exported: tuple[Path, Manifest], changes: dict[str, object], message: str
) -> None:
    folder, manifest = exported
    record = manifest.engines[0]
    beside = dataclasses.replace(record.files[0], **changes)  # type: ignore[arg-type]
    changed = dataclasses.replace(record, files=(record.files[0], beside))
    with pytest.raises(StaleEngineError, match=message):
        check_engine(changed, folder, current_target("cpu"), "zserve export ...")


def test_bytes_that_onnxruntime_refuses_are_a_load_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a graph")
    spec = SPECS[Component.DENOISER]
    with pytest.raises(EngineLoadError, match="ONNX Runtime cannot load"):
        OnnxRuntimeEngine(bad, spec, PROFILE, 1)


@pytest.mark.parametrize(
    ("rows", "height", "width", "fits"),
    [(1, 64, 64, True), (8, 512, 512, True), (9, 64, 64, False), (1, 48, 64, False), (1, 64, 528, False)],
)
def test_a_compiled_engine_takes_what_its_graph_was_exported_for(
    rows: int, height: int, width: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aotinductor, "open_package", lambda path, module: Package())
    monkeypatch.setattr(onnxruntime.onnxruntime, "InferenceSession", MagicMock())
    spec = SPECS[Component.DENOISER]
    shapes = {t.name: t.shape(ShapePoint(rows, 32, height, width)) for t in spec.inputs}
    onnx = OnnxRuntimeEngine(Path("x.onnx"), spec, PROFILE, 1)
    inductor = AotInductorEngine(Path("x.pt2"), spec, PROFILE, torch.nn.Linear(1, 1), 1)
    assert (onnx.fits(shapes), inductor.fits(shapes)) == (fits, fits)


class Package:
    """Fails as AOTInductor's C interface does: with one kind of error for all."""

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("run_func_(...) API call failed")


def test_memory_that_was_refused_inside_a_package_is_not_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = iter([3, 4, 7, 7])  # before and after each of two calls; what is refused between them is others'
    monkeypatch.setattr(memory, "refusals", lambda: next(refused))
    monkeypatch.setattr(aotinductor, "open_package", lambda path, module: Package())
    spec = SPECS[Component.IMAGE_DECODER]
    engine = AotInductorEngine(Path("x.pt2"), spec, PROFILE, torch.nn.Linear(1, 1), threads=1)
    with pytest.raises(torch.OutOfMemoryError, match="API call failed"):
        engine.run(INPUTS)
    with pytest.raises(EngineRunError, match="AOTInductor failed"):
        engine.run(INPUTS)


def test_a_package_gets_its_inputs_laid_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads them so whatever their strides."""
    given: list[torch.Tensor] = []
    monkeypatch.setattr(aotinductor, "open_package", lambda path, module: lambda *inputs: given.extend(inputs))
    spec = SPECS[Component.IMAGE_DECODER]
    engine = AotInductorEngine(Path("x.pt2"), spec, PROFILE, torch.nn.Linear(1, 1), threads=1)
    latents = torch.rand(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    engine.run({"latents": latents})
    assert given[0].is_contiguous()
    assert given[0].equal(latents)


def test_eager_answers_when_a_package_leaves_the_device_in_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that closing it fails too."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", MagicMock(side_effect=RuntimeError("unspecified launch failure")))
    engine = engine_on_cuda(monkeypatch, Package(), FakeRecorder())
    component = served(engine, eager_engine())  # type: ignore[arg-type]
    _, use = component.run(INPUTS)
    assert (use.backend, use.fallback_reason) == (Backend.EAGER, "AOTInductor failed: run_func_(...) API call failed")


class OnCuda(torch.nn.Module):
    """Says that its weights are on CUDA."""

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        yield SimpleNamespace(device=torch.device("cuda"))  # type: ignore[misc]


def engine_on_cuda(
    monkeypatch: pytest.MonkeyPatch, package: Callable[..., torch.Tensor], recorder: FakeRecorder
) -> AotInductorEngine:
    monkeypatch.setattr(aotinductor, "open_package", lambda path, module: package)
    monkeypatch.setattr(aotinductor, "CudaRecorder", create_autospec(CudaRecorder, return_value=recorder))
    spec = SPECS[Component.IMAGE_DECODER]
    return AotInductorEngine(Path("x.pt2"), spec, PROFILE, OnCuda(), threads=1)


def test_on_cuda_calls_are_recorded_until_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = FakeRecorder()
    engine = engine_on_cuda(monkeypatch, lambda latents: latents + 1, recorder)
    for value in range(4):
        assert engine.run({"latents": torch.full((1, 16, 8, 8), value)}).unique().item() == value + 1
    assert len(recorder.graphs) == 1
    served(engine, eager_engine()).free_memory()  # type: ignore[arg-type]
    for _ in range(3):
        assert engine.run(INPUTS).unique().item() == 1
    assert len(recorder.graphs) == 1, "what has been freed is needed"
    engine.close()


def test_memory_refused_while_recording_is_forgiven_and_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next failure, of another kind, would be taken for a lack of memory."""
    faults = iter([False, True, False, True])

    def package(latents: torch.Tensor) -> torch.Tensor:
        if next(faults):
            raise RuntimeError("run_func_(...) API call failed")
        return latents + 1

    refused = iter([3, 3, 4, 4, 4, 4])  # before each of four calls, and after each of the two that fail
    monkeypatch.setattr(memory, "refusals", lambda: next(refused))
    engine = engine_on_cuda(monkeypatch, package, FakeRecorder())
    for _ in range(2):
        assert engine.run(INPUTS).unique().item() == 1
    with pytest.raises(EngineRunError, match="AOTInductor failed"):
        engine.run(INPUTS)


def test_a_replay_that_fails_is_the_engines_fault_and_one_without_memory_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_on_cuda(monkeypatch, lambda latents: latents + 1, FakeRecorder())
    for _ in range(2):
        engine.run(INPUTS)
    monkeypatch.setattr(FakeGraph, "replay", MagicMock(side_effect=[torch.OutOfMemoryError("full"), RuntimeError("x")]))
    with pytest.raises(torch.OutOfMemoryError):
        engine.run(INPUTS)
    with pytest.raises(EngineRunError, match="AOTInductor failed: x"):
        engine.run(INPUTS)


def test_an_engine_that_keeps_nothing_is_not_asked_to_free_it() -> None:
    served(FakeEngine(lambda inputs: torch.zeros(1)), eager_engine()).free_memory()
