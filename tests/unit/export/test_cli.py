"""What `zserve export` refuses, and the remedy it names."""

import errno
import io
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from export import exporter
from export.cli import BAD_ARGUMENTS, NOT_POSSIBLE, _targets, image_size, main
from export.errors import ArgumentsError, BuildError, ExportError, ParityError, ResourcesError, UnsupportedError
from export.manifest import Target
from tests.conftest import CHECKPOINT

REFUSED = [
    ("--backend tensorrt_rtx", "for example --target sm89,sm120"),
    ("--backend tensorrt_rtx --target sm90", "does not build this model for cuda .compute capability 9.0."),
    ("--backend tensorrt_rtx --target sm75,sm89", "for cuda .compute capability 7.5.; it does for sm80, sm86"),
    ("--backend tensorrt_rtx --target sm89 --strip-weights", "leave out --strip-weights"),
    ("--backend onnxruntime --precision bf16", "computes in fp32 only.*give --precision fp32, or --backend aotind"),
    ("--precision fp8", "--precision fp8 is for --backend aotinductor on CUDA GPUs of compute capability 8.9 or newer"),
    ("--precision fp8 --backend aotinductor", "--backend aotinductor for cpu is asked for; leave out --precision"),
    ("--precision fp8 --backend eager", "--backend eager for cpu is asked for"),
    (
        "--precision fp8 --backend tensorrt_rtx --target sm89",
        "--backend tensorrt_rtx for cuda .compute capability 8.9.",
    ),
    ("--device cuda", r"--device cuda is not on this machine; cpu is accepted .this PyTorch sees no CUDA device."),
    ("--device cuda:1", "--device cuda:1 is not on this machine; cpu is accepted"),
    ("--device banana", "--device banana is not on this machine; cpu is accepted"),
]
CONTRADICTING = [
    ("--backend onnxruntime --target sm89", "are for TensorRT, and --backend is onnxruntime"),
    ("--revision main", "--revision and --cache-dir are for a hub, and --source is local; leave them out"),
    ("--cache-dir /tmp", "--revision and --cache-dir are for a hub, and --source is local; leave them out"),
    (
        "--default-size 2048x2048 --max-size 1024",
        "--default-size 2048x2048 cannot be served; .* 64 to 1024 are accepted",
    ),
    ("--default-size 48x48", "--default-size 48x48 cannot be served; sides that are multiples of 16 from 64 to 2048"),
    ("--warmup-size 256x256 --warmup-size 8000x8000", "--warmup-size 8000x8000 cannot be served"),
    ("--max-size 512", "--default-size 1024x1024 cannot be served.*Give another, or another --max-size"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="these are the answers of a machine without a GPU")
@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
@pytest.mark.parametrize(("arguments", "remedy"), REFUSED)
def test_a_refusal_names_the_remedy(
    arguments: str, remedy: str, dry_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", "m", *dry_run]
    assert main([*fixed, *arguments.split()]) == NOT_POSSIBLE
    said = capsys.readouterr().err
    assert re.search(remedy, said), said
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
@pytest.mark.parametrize(("arguments", "remedy"), CONTRADICTING)
def test_arguments_that_fit_no_machine_are_bad_arguments(
    arguments: str, remedy: str, dry_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", "m", "--device", "cpu", *dry_run]
    assert main([*fixed, *arguments.split()]) == BAD_ARGUMENTS
    said = capsys.readouterr().err
    assert re.search(remedy, said), said
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ArgumentsError, 2),
        (UnsupportedError, 3),
        (ResourcesError, 3),
        (BuildError, 1),
        (ParityError, 1),
        (ExportError, 1),
    ],
)
def test_what_is_not_possible_here_has_an_exit_status_of_its_own(
    error: type[ExportError], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("so it is")

    monkeypatch.setattr(exporter, "export_model", fail)
    fixed = ["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", "m", "--device", "cpu"]
    assert main(fixed) == status


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_or_a_limit_to_it_is_too_little_of_it(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(exporter, "export_model", fail)
    assert main(["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", "m"]) == NOT_POSSIBLE
    assert f"{os.strerror(number)} (while writing {tmp_path / 'm'})" in capsys.readouterr().err


class StoppedReader(io.StringIO):
    """Standard output as Python writes it unbuffered, of which `head` has had enough."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_a_reader_that_stops_is_not_reported_as_a_failure_to_write_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`zserve.main` ends such a command without a word."""
    monkeypatch.setattr(sys, "stdout", StoppedReader())
    with pytest.raises(BrokenPipeError):
        main(["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", "m", "--dry-run"])
    assert capsys.readouterr().err == "loading PyTorch ...\n"


def test_a_repository_that_is_a_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    arguments = ["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path / "file"), "--name", "m"]
    assert main([*arguments, "--backend", "eager", "--device", "cpu"]) == BAD_ARGUMENTS
    assert f"{tmp_path / 'file'} is not a folder; give a folder that can be written to" in capsys.readouterr().err


def test_a_repository_that_cannot_be_written_to_is_said_before_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tests' user may be root, who may write to any folder."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    arguments = ["--checkpoint", "owner/name", "--source", "huggingface", "--repository", str(tmp_path / "new" / "er")]
    assert main([*arguments, "--name", "m", "--backend", "eager", "--device", "cpu"]) == BAD_ARGUMENTS
    assert f"{tmp_path} cannot be written to" in capsys.readouterr().err


def test_the_help_tells_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"{NOT_POSSIBLE} not possible on this machine" in " ".join(capsys.readouterr().out.split())


def test_targets_are_in_one_order_and_sizes_without_zeros_before_them() -> None:
    """As manifests have them: plans for the same GPUs are the same however they were listed."""
    assert _targets("sm120,sm89,sm89") == _targets("sm89,sm120") == (Target("cuda", "8.9"), Target("cuda", "12.0"))
    assert image_size("0512x0256") == "512x256"


def test_fp16_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--checkpoint", "x", "--name", "m", "--precision", "fp16"])
    assert "exceed what fp16 holds (65504), which draws black images; use bf16" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["256", "304", "4112", "1000"])
def test_a_model_too_small_to_be_exported_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--checkpoint", "x", "--name", "m", "--max-size", size])
    assert f"'{size}': a multiple of 16 from 320 to 4096 is accepted" in capsys.readouterr().err


def test_a_config_that_is_kept_is_told_where_it_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", "m", "--backend", "eager"]
    assert main([*fixed, "--default-size", "256x256"]) == 0
    assert "is kept" not in capsys.readouterr().out
    assert main([*fixed, "--default-size", "512x512", "--max-batch", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'm' / 'config.pbtxt'} is kept: max_batch_size is 4, and 2 was asked for" in said
    assert "default_size is 256x256, and 512x512 was asked for" in said
    assert "warmup_sizes is 256x256, and 512x512 was asked for" in said
    assert main([*fixed, "--default-size", "512x512", "--max-batch", "2"]) == 0, "what is published is reused"
    assert "default_size is 256x256, and 512x512 was asked for" in capsys.readouterr().out
