"""What `zserve export` refuses, and the remedy it names."""

import re
from pathlib import Path

import pytest
import torch

from export.cli import main
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
    assert main([*fixed, *arguments.split()]) == 1
    said = capsys.readouterr().err
    assert re.search(remedy, said), said
    assert not (tmp_path / "m").exists()


def test_fp16_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--checkpoint", "x", "--name", "m", "--precision", "fp16"])
    assert "exceed what fp16 holds (65504), which draws black images; use bf16" in capsys.readouterr().err
