"""What `zserve export` refuses, and the remedy it names."""

import re
from pathlib import Path

import pytest
import torch

from export import exporter
from export.cli import NOT_POSSIBLE, main
from export.errors import BuildError, ExportError, ParityError, ResourcesError, UnsupportedError
from tests.conftest import CHECKPOINT

REFUSED = [
    ("--backend tensorrt_rtx", "for example --target sm89,sm120"),
    ("--backend tensorrt_rtx --target sm90", "does not build for cuda .compute capability 9.0.; it builds for sm75"),
    ("--backend tensorrt_rtx --target sm89 --strip-weights", "leave out --strip-weights"),
    ("--backend onnxruntime --target sm89", "are for TensorRT, and --backend is onnxruntime"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="these are the answers of a machine without a GPU")
@pytest.mark.parametrize(("arguments", "remedy"), REFUSED)
def test_a_refusal_names_the_remedy(
    arguments: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", "m"]
    assert main([*fixed, *arguments.split()]) == NOT_POSSIBLE
    said = capsys.readouterr().err
    assert re.search(remedy, said), said
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [(UnsupportedError, 3), (ResourcesError, 3), (BuildError, 1), (ParityError, 1), (ExportError, 1)],
)
def test_what_is_not_possible_here_has_an_exit_status_of_its_own(
    error: type[ExportError], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("so it is")

    monkeypatch.setattr(exporter, "export_model", fail)
    fixed = ["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", "m", "--device", "cpu"]
    assert main(fixed) == status


def test_the_help_tells_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"{NOT_POSSIBLE} not possible on this machine" in " ".join(capsys.readouterr().out.split())


def test_fp16_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--checkpoint", "x", "--name", "m", "--precision", "fp16"])
    assert "exceed what fp16 holds (65504), which draws black images; use bf16" in capsys.readouterr().err
