"""What an export builds again, and what it takes from earlier ones."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from export import exporter, onnx, reuse, validity
from export.build import BuildInputs, BuildOptions, Built, Runner
from export.build.aotinductor import called_libraries
from export.checkpoint import Checkpoint
from export.errors import ArgumentsError, CheckpointError, ResourcesError, VersionExistsError
from export.exporter import export_model
from export.kernels import attention
from export.manifest import Backend, EngineRecord, Manifest, Parity, Target
from export.parity import ParityCheck
from export.profiles import parity_points
from export.repository import INCOMPLETE, Existing, ServingDefaults, new_version, versions
from export.request import ExportRequest
from export.reuse import Exported, reusable_engines
from export.sources import Hub, Source
from export.spec import Component, ComponentSpec, Precision, ShapePoint, component_specs
from tests.conftest import CHECKPOINT
from tests.unit.export.test_estimate import Free

ENCODER, DENOISER, DECODER = Component
# No such device is here, so nothing is run.
OPTIONS = BuildOptions((Target("cuda", "8.9"),))
PARITY = Parity(0.0, 1.0, 5)
fit_preview_once = cache(exporter.fit_preview)


@dataclass
class FakeBuilder:
    """Writes a few bytes an engine; stops where it is told to."""

    stop_at: Component | None = None
    built: list[Component] = field(default_factory=list)
    libraries: tuple[str, ...] = ("torch",)
    denoiser_calls: tuple[str, ...] = ()

    def check(self, precision: Precision) -> None:
        pass

    def build(self, inputs: BuildInputs, folder: Path) -> Built:
        component = inputs.spec.component
        path = folder / f"{component}.pt2"
        path.write_text("half")
        if component is self.stop_at:
            raise KeyboardInterrupt
        path.write_text(f"engine {component}")
        self.built.append(component)
        return Built((path,), calls=self.denoiser_calls if component is DENOISER else ())

    def load(self, path: Path, module: nn.Module, spec: ComponentSpec) -> Runner:
        raise AssertionError("nothing is run")


class FakeChecker(AbstractContextManager["FakeChecker"]):
    """Finds every engine right."""

    def check(self, check: ParityCheck, tolerance: float) -> Parity:
        return PARITY

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def request_(tmp_path: Path) -> ExportRequest:
    return ExportRequest(
        source=Source(Hub.LOCAL, str(CHECKPOINT)),
        repository=tmp_path,
        name="m",
        backend=Backend.AOTINDUCTOR,
        precision=Precision.FP32,
        device="cpu",
        options=OPTIONS,
        serving=ServingDefaults(default_size="256x256"),
    )


def run(request: ExportRequest, builder: FakeBuilder, monkeypatch: pytest.MonkeyPatch) -> Exported:
    monkeypatch.setattr(exporter, "builder_for", lambda backend, options: builder)
    monkeypatch.setattr(exporter, "fit_preview", fit_preview_once)
    return export_model(request, lambda stage, done: None)


def test_an_interrupted_export_resumes_at_the_component_it_was_building(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = FakeBuilder(stop_at=DENOISER), FakeBuilder()
    with pytest.raises(KeyboardInterrupt):
        run(request_, first, monkeypatch)
    assert first.built == [ENCODER]
    assert versions(request_.model) == []
    done = run(request_, second, monkeypatch)
    assert second.built == [DENOISER, DECODER]
    assert done.reused == {ENCODER}
    assert [e.component for e in done.manifest.engines] == list(Component)
    assert (done.folder / "denoiser.pt2").read_text() == "engine denoiser", "the half-written one is gone"
    assert not list(request_.model.glob(".incomplete*"))


@pytest.mark.parametrize("damage", ["truncate", "other settings"])
def test_only_what_is_whole_and_of_the_same_request_is_resumed(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(request_, FakeBuilder(stop_at=DENOISER), monkeypatch)
    if damage == "truncate":
        (request_.model / INCOMPLETE[Existing.KEEP] / "prompt_encoder.pt2").write_text("cut")
    else:
        request_ = replace(request_, serving=replace(request_.serving, max_batch=2))
    second = FakeBuilder()
    assert run(request_, second, monkeypatch).reused == frozenset()
    assert second.built == list(Component)


def test_a_whole_version_is_not_built_again_unless_forced(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(request_, FakeBuilder(), monkeypatch)
    again = run(request_, FakeBuilder(stop_at=ENCODER), monkeypatch)
    assert (again.folder.name, again.reused) == ("1", frozenset(Component))
    config = request_.model / "config.pbtxt"
    written = config.read_text()
    config.unlink()  # as `zserve export` says, where another is wanted
    run(request_, FakeBuilder(stop_at=ENCODER), monkeypatch)
    assert config.read_text() == written
    forced = FakeBuilder()
    assert run(replace(request_, existing=Existing.REPLACE), forced, monkeypatch).folder.name == "2"
    assert forced.built == list(Component)


def test_a_forced_export_resumes_its_own_work_and_nothing_older(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(request_, FakeBuilder(), monkeypatch)
    (request_.model / "1" / "denoiser.pt2").write_text("engine damaged!")
    with pytest.raises(KeyboardInterrupt):
        run(request_, FakeBuilder(stop_at=DENOISER), monkeypatch)  # with two engines of version 1 that still hold
    forced = replace(request_, existing=Existing.REPLACE)
    first, second = FakeBuilder(stop_at=DECODER), FakeBuilder()
    with pytest.raises(KeyboardInterrupt):
        run(forced, first, monkeypatch)
    assert first.built == [ENCODER, DENOISER]
    done = run(forced, second, monkeypatch)
    assert second.built == [DECODER]
    assert (done.folder.name, done.reused) == ("2", {ENCODER, DENOISER})
    assert not list(request_.model.glob(".incomplete*"))


def test_an_export_that_is_not_forced_leaves_nothing_of_its_own_to_one_that_is(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = replace(request_, existing=Existing.REPLACE)
    for interrupted in (forced, request_):
        with pytest.raises(KeyboardInterrupt):
            run(interrupted, FakeBuilder(stop_at=DENOISER), monkeypatch)
    again = FakeBuilder()
    assert run(forced, again, monkeypatch).reused == frozenset()
    assert again.built == list(Component)


def test_an_export_interrupted_again_before_it_builds_keeps_what_was_finished(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(request_, FakeBuilder(), monkeypatch)
    for component in (ENCODER, DENOISER):
        (request_.model / "1" / f"{component}.pt2").write_text("damaged")
    with pytest.raises(KeyboardInterrupt):
        run(request_, FakeBuilder(stop_at=DENOISER), monkeypatch)

    def interrupted(folder: Path, request: ExportRequest, checkpoint: Checkpoint) -> dict[Component, EngineRecord]:
        if folder.name == "1":
            raise KeyboardInterrupt
        return reusable_engines(folder, request, checkpoint)

    with monkeypatch.context() as during:
        during.setattr(reuse, "reusable_engines", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(request_, FakeBuilder(), monkeypatch)
    last = FakeBuilder()
    run(request_, last, monkeypatch)
    assert last.built == [DENOISER]


def test_disk_that_is_spent_already_is_not_asked_for_again(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of an AOTInductor export is 60 MB for each package."""
    with pytest.raises(KeyboardInterrupt):
        run(request_, FakeBuilder(stop_at=DECODER), monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Free(free=59_000_000))
    with pytest.raises(ResourcesError, match=r"needs 0\.1 GB of disk"):
        run(request_, FakeBuilder(), monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Free(free=61_000_000))
    assert run(request_, FakeBuilder(), monkeypatch).reused == {ENCODER, DENOISER}
    with pytest.raises(ResourcesError, match=r"needs 0\.2 GB of disk"):
        run(replace(request_, existing=Existing.REPLACE), FakeBuilder(), monkeypatch)


def test_engines_are_taken_wherever_the_checkpoint_lies_now(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(request_, FakeBuilder(), monkeypatch)
    moved = Path(shutil.copytree(CHECKPOINT, tmp_path / "moved"))
    builder = FakeBuilder()
    done = run(replace(request_, source=Source(Hub.LOCAL, str(moved))), builder, monkeypatch)
    assert builder.built == []
    assert (done.folder.name, done.reused) == ("2", frozenset(Component))
    assert done.manifest.checkpoint.path == str(moved), "a server reads it there"


def test_whatever_lies_in_an_interrupted_exports_folder_goes(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    (request_.model / INCOMPLETE[Existing.KEEP] / "folder" / "inside").mkdir(parents=True)
    done = run(request_, FakeBuilder(), monkeypatch)
    assert not (done.folder / "folder").exists()


@dataclass
class OutOfMemoryBuilder(FakeBuilder):
    """The device has no memory for what it builds."""

    def build(self, inputs: BuildInputs, folder: Path) -> Built:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")


def test_a_device_without_memory_is_not_the_backends_fault(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourcesError, match=r"too little memory to build prompt_encoder \(.* 2 GiB\); end what else"):
        run(request_, OutOfMemoryBuilder(), monkeypatch)


@pytest.mark.parametrize("library", ["torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript"])
def test_an_engine_is_built_again_when_a_library_that_shaped_it_is_another(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """Also those that an engine of this backend loads without."""
    here, libraries = validity.installed_version, ("torch", *onnx.LIBRARIES)
    run(request_, FakeBuilder(libraries=libraries), monkeypatch)
    again = FakeBuilder(libraries=libraries)
    assert run(request_, again, monkeypatch).folder.name == "1"
    monkeypatch.setattr(validity, "BINDING_LIBRARIES", {Backend.AOTINDUCTOR: ()})
    monkeypatch.setattr(validity, "installed_version", lambda name: "99.0" if name == library else here(name))
    done = run(request_, again, monkeypatch)
    assert again.built == list(Component)
    assert {e.built_with[library] for e in done.manifest.engines} == {"99.0"}


def test_the_denoiser_is_built_again_when_flash_attention_has_been_installed(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = validity.installed_version
    run(request_, FakeBuilder(), monkeypatch)
    monkeypatch.setattr(validity, "installed_version", lambda name: "0.0.3" if name == "fa3-fwd" else here(name))
    monkeypatch.setattr(attention, "is_there", lambda device: True)
    assert run(request_, FakeBuilder(), monkeypatch).reused == frozenset(Component), "in fp32 nothing calls it"
    bf16 = replace(request_, precision=Precision.BF16)
    run(bf16, FakeBuilder(), monkeypatch)
    builder = FakeBuilder(denoiser_calls=called_libraries(DENOISER, Precision.BF16, torch.device("cuda")))
    assert run(bf16, builder, monkeypatch).reused == {ENCODER, DECODER}
    assert run(bf16, FakeBuilder(), monkeypatch).reused == frozenset(Component)


def test_an_engine_that_was_never_run_is_built_again_where_it_can_be(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine built elsewhere for the device that is here now."""
    run(request_, FakeBuilder(), monkeypatch)
    monkeypatch.setattr(reuse, "current_target", lambda device: OPTIONS.targets[0])
    monkeypatch.setattr(exporter, "Checker", FakeChecker)
    builder = FakeBuilder()
    done = run(request_, builder, monkeypatch)
    assert builder.built == list(Component)
    assert [e.parity for e in done.manifest.engines] == 3 * [PARITY]
    assert run(request_, FakeBuilder(stop_at=ENCODER), monkeypatch).folder == done.folder


def test_a_damaged_engine_of_the_newest_version_is_built_again_alone(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(request_, FakeBuilder(), monkeypatch)
    (request_.model / "1" / "denoiser.pt2").write_text("engine damaged!")
    builder = FakeBuilder()
    done = run(request_, builder, monkeypatch)
    assert builder.built == [DENOISER]
    assert done.folder.name == "2"
    assert (done.folder / "prompt_encoder.pt2").read_text() == "engine prompt_encoder"


def test_why_an_engine_is_not_reused_is_logged_without_a_command(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is built again in the same run: nobody has to do anything."""
    run(request_, FakeBuilder(), monkeypatch)
    file = request_.model / "1" / "denoiser.pt2"
    file.write_text("cut")
    caplog.clear()
    run(request_, FakeBuilder(), monkeypatch)
    problem = "is damaged: 15 bytes of denoiser.pt2 expected, 3 found"
    assert caplog.messages == [f"denoiser engine {file} {problem}; it is built again"]


def test_the_version_reported_is_the_one_written(request_: ExportRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when another export publishes the next one at once."""

    @contextmanager
    def followed(*which: Any) -> Iterator[Any]:
        with new_version(*which) as made:
            yield made
        (request_.model / "2").mkdir()

    monkeypatch.setattr(exporter, "new_version", followed)
    assert run(request_, FakeBuilder(), monkeypatch).folder.name == "1"


class Retraining(FakeBuilder):
    """Something else writes the checkpoint's weights anew while the denoiser is built."""

    def build(self, inputs: BuildInputs, folder: Path) -> Built:
        if inputs.spec.component is DENOISER:
            (weights,) = (inputs.source.checkpoint / "vae").glob("*.safetensors")
            with weights.open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"new!")
        return super().build(inputs, folder)


def test_an_engine_of_a_checkpoint_that_changed_meanwhile_is_not_recorded(
    request_: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, changing)
    request_ = replace(request_, source=Source(Hub.LOCAL, str(changing)))
    with pytest.raises(CheckpointError, match=r"has changed while denoiser.*the same command again"):
        run(request_, Retraining(), monkeypatch)
    assert versions(request_.model) == []
    recorded = Manifest.read(request_.model / INCOMPLETE[Existing.KEEP]).engines
    assert [engine.component for engine in recorded] == [ENCODER]
    again = FakeBuilder()
    run(request_, again, monkeypatch)
    assert again.built == list(Component), "all of the checkpoint that is there now"


def test_a_version_number_of_ones_own(request_: ExportRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered = replace(request_, version=7)
    assert run(numbered, FakeBuilder(), monkeypatch).folder.name == "7"
    with pytest.raises(VersionExistsError, match="--force replaces it"):
        run(numbered, FakeBuilder(), monkeypatch)
    assert run(replace(numbered, existing=Existing.REPLACE), FakeBuilder(), monkeypatch).folder.name == "7"
    assert versions(request_.model) == [7]


@dataclass
class ReadingBuilder(FakeBuilder):
    """Reads the weights and never forgets them, as torch.export's and Inductor's caches do."""

    held: list[nn.Module] = field(default_factory=list)

    def build(self, inputs: BuildInputs, folder: Path) -> Built:
        assert self.bytes() == 0
        self.held.append(inputs.module())
        assert self.bytes() > 0
        return super().build(inputs, folder)

    def bytes(self) -> int:
        """What the weights take."""
        tensors = (t for module in self.held for t in (*module.parameters(), *module.buffers()))
        return sum(t.untyped_storage().nbytes() for t in tensors)


def test_one_component_at_a_time_is_in_memory_and_none_while_it_is_checked(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three of the published model do not fit on the GPUs that it is made for, nor does one of them twice."""

    def load(checkpoint: Path, *, wanted: list[Component], **_: object) -> dict[Component, nn.Module]:
        assert len(wanted) == 1
        return {component: nn.BatchNorm1d(8) for component in wanted}

    class Looking(FakeChecker):
        def check(self, check: ParityCheck, tolerance: float) -> Parity:
            assert builder.bytes() == 0
            assert emptied, "else the memory is the allocator's, and not the checker's"
            emptied.clear()
            return super().check(check, tolerance)

    builder, emptied = ReadingBuilder(), list[bool]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(reuse, "current_target", lambda device: OPTIONS.targets[0])
    monkeypatch.setattr(exporter, "load_components", load)
    monkeypatch.setattr(exporter, "Checker", Looking)
    run(request_, builder, monkeypatch)
    assert len(builder.held) == 3


def test_engines_are_checked_as_they_are_served(request_: ExportRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[ParityCheck] = []

    class Noting(FakeChecker):
        def check(self, check: ParityCheck, tolerance: float) -> Parity:
            checks.append(ParityCheck.of_line(check.as_line()))
            return super().check(check, tolerance)

    monkeypatch.setattr(reuse, "current_target", lambda device: OPTIONS.targets[0])
    monkeypatch.setattr(exporter, "Checker", Noting)
    served = replace(request_, serving=ServingDefaults(default_size="1024x768", max_batch=3))
    done = run(served, FakeBuilder(), monkeypatch)
    assert [check.component for check in checks] == list(Component)
    for check in checks:
        wanted = {ShapePoint(1, 64, 768, 1024), ShapePoint(6, 32, 64, 64), ShapePoint(1, 512, 64, 64)}
        assert wanted <= set(check.points)
        assert check.points == done.manifest.parity_points
    fixed, ranged = served.profiles
    spec = component_specs(done.manifest.checkpoint.dimensions)[DENOISER]
    assert {fixed, ranged} == {
        next(p for p in (fixed, ranged) if p.takes(spec, spec.input_shapes(point))) for point in checks[0].points
    }, "every profile of a plan runs"


@pytest.mark.parametrize("max_size", [256, 320, 2048])
def test_no_engine_is_checked_past_its_limits(max_size: int) -> None:
    for point in parity_points((256, 256), 2, max_size):
        assert max(point.height, point.width) <= max_size
        assert point.batch <= 2


def test_sizes_past_the_checkpoints_position_tables_are_refused(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_large = replace(request_, serving=replace(request_.serving, max_size=8208))
    with pytest.raises(ArgumentsError, match="give --max-size 8192 or less"):
        run(too_large, FakeBuilder(), monkeypatch)
