"""What an export says it needs, and its refusal where there is not enough."""

import shutil
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from export.cli import NOT_POSSIBLE, main
from export.modules import load_components
from export.spec import Component, Precision
from tests.conftest import CHECKPOINT

ARGUMENTS = ["--checkpoint", str(CHECKPOINT), "--name", "m", "--dry-run", "--backend"]


class Free(NamedTuple):
    """What the operating system says there is."""

    free: int = 1 << 40
    available: int = 1 << 40


def test_a_dry_run_says_what_would_be_built_and_builds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "models"
    assert main([*ARGUMENTS, "tensorrt_rtx", "--target", "sm89,sm120", "--repository", str(repository)]) == 0
    said = capsys.readouterr().out
    assert "download   nothing" in said
    assert "build for  cuda (compute capability 8.9), cuda (compute capability 12.0)" in said
    assert all(component in said for component in Component)
    assert not repository.exists()


def test_the_weights_are_counted_as_they_are(tmp_path: Path) -> None:
    from export.checkpoint import open_checkpoint
    from export.estimate import elements

    modules = load_components(CHECKPOINT, precision=Precision.FP32, device="cpu")
    held = {c: sum(p.numel() for p in m.parameters()) for c, m in modules.items()}
    counted = {c: elements(open_checkpoint(CHECKPOINT).path, c) for c in Component}
    assert counted[Component.DENOISER] == held[Component.DENOISER]
    assert counted[Component.IMAGE_DECODER] == held[Component.IMAGE_DECODER]
    # The last layer and norm of the text encoder are not used.
    assert held[Component.PROMPT_ENCODER] < counted[Component.PROMPT_ENCODER] < 1.5 * held[Component.PROMPT_ENCODER]


def test_eager_needs_no_room_for_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its export reads the VAE, and builds nothing."""
    has = Free(free=0, available=2_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: has)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: has)
    arguments = ["--repository", str(tmp_path), "--device", "cpu"]
    assert main([*ARGUMENTS, "eager", *arguments]) == 0, capsys.readouterr().err
    assert main([*ARGUMENTS, "aotinductor", *arguments]) == NOT_POSSIBLE


@pytest.mark.parametrize(
    ("what", "remedy"), [("disk", "give another --repository"), ("memory", "export on a larger machine")]
)
@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
def test_too_little_is_refused_before_anything_is_built(
    what: str,
    remedy: str,
    dry_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    has = Free(free=1000) if what == "disk" else Free(available=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: has)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: has)
    arguments = [a for a in ARGUMENTS if a != "--dry-run"]
    assert main([*arguments, "onnxruntime", "--repository", str(tmp_path / "models"), *dry_run]) == NOT_POSSIBLE
    said = capsys.readouterr().err
    assert f"GB of {what}" in said
    assert remedy in said
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("limits", [{"": 3}, {"a": 3, "a/b": None}, {"a": 100, "a/b": 3}])
def test_memory_that_a_container_may_not_take_is_not_there(
    limits: dict[str, int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where its control group, or one above, has a limit; the file cache in it can be dropped."""
    monkeypatch.setattr(psutil, "virtual_memory", Free)
    monkeypatch.setattr("export.control_groups.GROUPS", tmp_path)
    monkeypatch.setattr("export.control_groups.OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text(f"0::/{list(limits)[-1]}\n")
    for name, limit in limits.items():
        group = tmp_path / name
        group.mkdir(exist_ok=True)
        (group / "memory.max").write_text("max\n" if limit is None else f"{limit}000000000\n")
        (group / "memory.current").write_text("2500000000\n")
        (group / "memory.stat").write_text("anon 900000000\nactive_file 1000000000\ninactive_file 600000000\n")
    arguments = [*ARGUMENTS, "eager", "--repository", str(tmp_path / "models"), "--device", "cpu"]
    assert main(arguments) == 0, capsys.readouterr().err
    for name in limits:
        (tmp_path / name / "memory.current").write_text("2800000000\n")
    assert main(arguments) == NOT_POSSIBLE
    assert "needs 2.0 GB of memory and 1.8 GB are available" in capsys.readouterr().err
