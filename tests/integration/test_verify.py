"""`zserve inspect`, `zserve parity` and `zserve verify`, as their users call them."""

import errno
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from torch import Tensor

from export.cli import NOT_POSSIBLE
from export.manifest import Backend, FileRecord, Manifest
from export.repository import versions
from export.spec import Component, ShapePoint
from server.engines.base import Shapes
from server.engines.onnxruntime import OnnxRuntimeEngine
from server.errors import EngineRunError
from tests.conftest import CHECKPOINT, MODEL
from verify import gpu, images, inspection, machine, parity


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures, not statistics."""
    monkeypatch.setattr(parity, "REPEATS", 1)
    monkeypatch.setattr(images, "STEPS", 4)


def newest(repository: Path) -> Path:
    return repository / MODEL / str(versions(repository / MODEL)[-1])


def test_inspect_tells_all_about_plans_that_cannot_run_here(
    tensorrt_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspection.main([str(tensorrt_repository / MODEL), "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [c["component"] for c in told["components"]] == list(Component)
    denoiser = told["components"][1]
    assert denoiser["inputs"][0] == {
        "name": "latents",
        "dtype": "float32",
        "shape": ["batch", 16, "latent_height", "latent_width"],
    }
    engine = denoiser["engine"]
    assert engine["plan"]["fused_attention"] == 9
    assert [p["maximum"]["batch"] for p in engine["plan"]["profiles"]] == [1, 8]
    assert engine["parity"] is None
    assert not engine["usable_here"]
    assert "this is cpu; rebuild it: zserve export" in engine["problem"]

    assert inspection.main([str(tensorrt_repository / MODEL), "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "attention  9 fused, 0 decomposed" in table
    assert "never run: the machine that built it has none of these GPUs" in table


def test_inspect_knows_what_is_usable(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspection.main([str(repository / MODEL), "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert table.count("usable on cpu") == 3
    assert "relative error" in table
    assert "MatMul" in table, "the graph's nodes"
    assert "cannot be served" not in table


def test_the_command_that_rebuilds_is_for_a_model_wherever_it_is_called_from(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / MODEL
    shutil.copytree(repository / MODEL, model)
    for file in model.glob("*/denoiser.onnx*"):
        file.write_bytes(b"damaged")
    monkeypatch.chdir(model)
    assert inspection.main([".", "--device", "cpu"]) == 0
    assert f"--repository {tmp_path} " in " ".join(capsys.readouterr().out.split())


def test_an_engine_that_cannot_be_read_is_said(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("export.validity.content_digest", refuse)
    assert inspection.main([str(repository / MODEL), "--device", "cpu"]) == 0
    assert "cannot be read (Permission denied); rebuild it:" in " ".join(capsys.readouterr().out.split())


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (inspection.main, parity.main):
        assert command([str(tmp_path / "m")]) == 1
        assert "such as models/z-image-demo; `zserve export` makes one" in capsys.readouterr().err


def strict_json(text: str) -> Any:
    """What every reader of JSON takes: Python's own writes and reads NaN and Infinity too."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_engines_that_are_right_pass(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(repository / MODEL), "--device", "cpu", "--images", "1", "--json"]) == 0
    report = strict_json(capsys.readouterr().out)
    assert report["within_tolerance"] is True
    for component in report["components"]:
        assert component["backend"] == "onnxruntime"
        assert component["relative_error"] <= component["tolerance"]
        assert component["cosine"] > 0.9999
    assert report["images"]["largest_difference"] <= 1
    assert report["images"]["score"] == report["images"]["eager_score"]


def damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "denoiser.onnx").write_bytes(b"damaged")


def fail_on_the_first_real_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(engine: OnnxRuntimeEngine, inputs: Mapping[str, Tensor]) -> Tensor:
        if "timestep" in inputs and drawing:
            raise EngineRunError("kaput")
        return right(engine, inputs)

    def draw(*arguments: Any) -> Any:
        drawing.append(True)
        return images.draw(*arguments)

    drawing: list[bool] = []
    right = OnnxRuntimeEngine.run
    monkeypatch.setattr(OnnxRuntimeEngine, "run", run)
    monkeypatch.setattr(parity, "draw", draw)


def take_no_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(engine: OnnxRuntimeEngine, shapes: Shapes) -> bool:
        return "timestep" not in shapes or shapes["timestep"] == (1,)

    monkeypatch.setattr(OnnxRuntimeEngine, "fits", fits)


def give_nan_at_the_default_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(engine: OnnxRuntimeEngine, inputs: Mapping[str, Tensor]) -> Tensor:
        output = right(engine, inputs)
        return output * float("nan") if "timestep" in inputs and inputs["latents"].shape[2:] == (8, 12) else output

    right = OnnxRuntimeEngine.run
    monkeypatch.setattr(OnnxRuntimeEngine, "run", run)


def small_copy(repository: Path, tmp_path: Path) -> Path:
    """A version to break, of a small default size, which eager draws in no time."""
    folder = tmp_path / MODEL / "1"
    shutil.copytree(newest(repository), folder)
    replace(Manifest.read(folder), default_size="96x64").write(folder)
    return folder


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are compared at the default size and in a batch only: all shapes are for engines that are right."""
    points = (ShapePoint(1, 64, 64, 96), ShapePoint(2, 32, 64, 64))
    monkeypatch.setattr(Manifest, "parity_points", property(lambda manifest: points))


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (damage, "is damaged: .* bytes of denoiser.onnx expected, 7 found"),
        (fail_on_the_first_real_step, "kaput"),
        (take_no_batches, "the onnxruntime engine was not built for"),
        (give_nan_at_the_default_size, "not finite"),
    ],
)
def test_an_engine_that_should_run_here_and_does_not_fails(
    break_it: Callable[[Path, pytest.MonkeyPatch], None],
    problem: str,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Eager answers in its place, and agrees with itself."""
    folder = small_copy(repository, tmp_path)
    break_it(folder, monkeypatch)
    assert parity.main([str(folder.parent), "--device", "cpu", "--images", "1", "--json"]) == 1
    report = strict_json(capsys.readouterr().out)
    assert report["within_tolerance"] is False
    encoder, denoiser, decoder = report["components"]
    assert re.search(problem, denoiser["not_run"])
    assert denoiser["relative_error"] is None
    assert (encoder["not_run"], decoder["not_run"]) == ("", "")


def other_weights(manifest: Manifest) -> Manifest:
    return replace(manifest, checkpoint=replace(manifest.checkpoint, fingerprint="0" * 64))


def moved_away(manifest: Manifest) -> Manifest:
    return replace(manifest, checkpoint=replace(manifest.checkpoint, path="/nowhere/at/all"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (other_weights, f"the checkpoint {CHECKPOINT} has changed since {MODEL} was exported from it; export it again"),
        (moved_away, f"{MODEL} was exported from the checkpoint /nowhere/at/all, which .* is not there; put it back"),
    ],
)
def test_a_checkpoint_that_is_not_what_it_was_is_told_before_anything_is_compared(
    change: Callable[[Manifest], Manifest],
    problem: str,
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / MODEL / "1"
    shutil.copytree(newest(repository), folder)
    change(Manifest.read(folder)).write(folder)
    assert parity.main([str(folder.parent), "--device", "cpu"]) == 1
    assert re.search(problem, capsys.readouterr().err)
    assert inspection.main([str(folder.parent), "--device", "cpu", "--json"]) == 0
    assert re.search(problem, json.loads(capsys.readouterr().out)["checkpoint"]["problem"])
    assert inspection.main([str(folder.parent), "--device", "cpu"]) == 0
    assert re.search(f"  cannot be served: {problem}", capsys.readouterr().out)


def test_nothing_is_said_of_engines_for_other_devices(
    tensorrt_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity.main([str(tensorrt_repository / MODEL), "--device", "cpu", "--json"]) == NOT_POSSIBLE
    report = strict_json(capsys.readouterr().out)
    assert (report["within_tolerance"], report["images"]) == (None, None)
    assert {c["not_run"] for c in report["components"]} == {
        "built for cuda (compute capability 8.9), cuda (compute capability 12.0), this is cpu"
    }


@pytest.mark.parametrize(
    ("worst", "score", "within"),
    [
        (None, 1.0, True),
        (25.0, 1.0, True),
        (19.9, 1.0, False),
        (25.0, 0.9, True),
        (25.0, 0.8, False),
        (25.0, None, True),
    ],
)
def test_images_are_close_and_show_what_was_asked_for(worst: float | None, score: float | None, within: bool) -> None:
    """One in ten may be tipped by rounding."""
    eager_score = None if score is None else 1.0
    assert images.ImageParity(10, worst, 3, score, eager_score).within(20.0) is within


def test_four_images_lose_none() -> None:
    assert not images.ImageParity(4, 25.0, 3, 0.5, 0.75).within(20.0)
    assert images.ImageParity(4, 25.0, 3, 0.75, 0.75).within(20.0)


@pytest.mark.usefixtures("few_shapes")
def test_an_engine_that_is_slightly_wrong_does_not(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_copy(repository, tmp_path)
    path = folder / "prompt_encoder.onnx"
    model = onnx.load(path)
    (bias,) = (t for t in model.graph.initializer if t.name == "cap_embedder.1.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.01, bias.name))
    onnx.save(model, path)
    manifest = Manifest.read(folder)
    engines = tuple(
        replace(e, files=(FileRecord.of(path),)) if e.component is Component.PROMPT_ENCODER else e
        for e in manifest.engines
    )
    replace(manifest, engines=engines).write(folder)
    assert parity.main([str(folder.parent), "--device", "cpu", "--images", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "BAD relative error" in next(line for line in lines if "prompt_encoder" in line)
    assert "ok  relative error" in next(line for line in lines if "denoiser" in line)


def test_verify_reports_on_every_backend(repository: Path, tensorrt_repository: Path, tmp_path: Path) -> None:
    """One that runs here, one that is built for other machines, and one that is not possible."""
    kept, out = tmp_path / "kept", tmp_path / "report"
    for backend, source in ((Backend.ONNXRUNTIME, repository), (Backend.TENSORRT_RTX, tensorrt_repository)):
        shutil.copytree(newest(source), kept / f"verified-{backend}" / "1")
    backends = ("--backend", "onnxruntime", "--backend", "tensorrt_rtx", "--backend", "tensorrt")
    arguments = ("--checkpoint", str(CHECKPOINT), "--repository", str(kept), "--device", "cpu", "--images", "1")
    assert gpu.main([*arguments, *backends, "--out", str(out)]) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["machine"]["device"] == "cpu"
    assert report["machine"].keys() >= {"cpu", "zserve", "commit"}
    assert report["settings"] == {"checkpoint": str(CHECKPOINT), "default_size": "256x256", "images": 1}
    here, elsewhere, nowhere = report["backends"]
    assert (here["built"], here["right"], here["problem"]) == (True, True, "")
    assert [c["component"] for c in here["parity"]["components"]] == list(Component)
    assert (elsewhere["built"], elsewhere["right"]) == (True, None)
    assert elsewhere["version"]["components"][1]["engine"]["plan"]["fused_attention"] == 9
    assert (nowhere["built"], nowhere["right"]) == (False, None)
    assert "tensorrt" in nowhere["problem"]
    lines = out.with_suffix(".md").read_text().splitlines()
    for component in Component:
        (row,) = (line for line in lines if line.startswith("| onnxruntime") and f"| fp32 | {component} |" in line)
        assert len(row.split("|")) == 10
    assert f"Checkpoint {CHECKPOINT}; milliseconds are of one call at 256x256, the median." in lines
    assert any(line.startswith("| tensorrt_rtx |") and "| bf16 |" in line for line in lines)
    assert any(line.startswith("| tensorrt_rtx |") and "| no |" not in line for line in lines)
    assert "| tensorrt | no | | | | | | |" in lines
    assert "* tensorrt_rtx: built for sm89,sm120, and not run, as this machine has no GPU" in lines
    assert any("1 images, PSNR at least" in line for line in lines)
    assert list((kept / "verified-onnxruntime").glob("[0-9]*")) == [kept / "verified-onnxruntime" / "1"], "reused"


@pytest.mark.parametrize(
    ("status", "verdict", "row"), [(1, 1, "FAILED"), (-9, 1, "FAILED"), (NOT_POSSIBLE, NOT_POSSIBLE, "no")]
)
def test_verify_fails_where_an_export_does_unless_it_is_not_possible_here(
    status: int, verdict: int, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export checks its engines itself: one that differs, or ends the checker, is seen there first."""

    def run(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        assert command == "export"
        return subprocess.CompletedProcess([], status, "", "zserve export: the denoiser differs from eager\n")

    monkeypatch.setattr(gpu, "_zserve", run)
    out = tmp_path / "report"
    assert gpu.main(["--backend", "aotinductor", "--device", "cpu", "--out", str(out)]) == verdict
    (told,) = json.loads(out.with_suffix(".json").read_text())["backends"]
    assert (told["built"], told["right"]) == (False, False if verdict == 1 else None)
    assert f"| aotinductor | {row} | | | | | | |" in out.with_suffix(".md").read_text()


def test_verify_tells_why_nothing_was_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--default-size", "100x100"])
    assert "'100x100': WIDTHxHEIGHT with multiples of 16 is accepted" in capsys.readouterr().err
    fixed = ["--backend", "onnxruntime", "--out", str(tmp_path / "report")]
    assert gpu.main(["--checkpoint", str(tmp_path), *fixed]) == 1
    assert f"onnxruntime: FAILED: zserve export: {tmp_path}" in capsys.readouterr().out


def test_a_report_names_the_commit_of_its_own_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed inside of another project's checkout, zserve has none."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=b@c", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    (tmp_path / "a.py").touch()
    git("add", "a.py")
    git("commit", "-m", "first")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == git("rev-parse", "HEAD")
    (tmp_path / "a.py").write_text("changed = True")
    assert machine.commit() == git("rev-parse", "HEAD") + "+"
    installed = tmp_path / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(machine, "ROOT", installed)
    assert machine.commit() is None


def test_a_report_keeps_its_whole_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That ends like one with a suffix."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "zserve export: kaput\n")

    monkeypatch.setattr(gpu, "_zserve", run)
    out = tmp_path / "a-1.0"
    assert gpu.main(["--backend", "aotinductor", "--device", "cpu", "--out", str(out)]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a-1.0.md", "a-1.0.json"}
    assert f"report: {out}.md and {out}.json" in capsys.readouterr().out


def test_verify_fails_where_an_engine_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is built and ends the process that compares it."""

    def run(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        status = -11 if command == "parity" else 0
        return subprocess.CompletedProcess([], status, "{}" if command == "inspect" else "", "")

    monkeypatch.setattr(gpu, "_zserve", run)
    out = tmp_path / "report"
    assert gpu.main(["--backend", "aotinductor", "--device", "cpu", "--out", str(out)]) == 1
    assert "* aotinductor: its process was killed by signal 11" in out.with_suffix(".md").read_text()
