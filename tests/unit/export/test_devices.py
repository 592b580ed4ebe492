"""Which devices are taken, by every command alike, and that the one asked for is the one that computes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from export import cli
from export.build import BuildOptions, builder_for
from export.cli import NOT_POSSIBLE
from export.devices import checked_device, current_target, use_device
from export.errors import UnsupportedError
from export.manifest import Backend, Target
from export.parity import ParityCheck, measure_parity
from export.spec import Component, ModelDimensions, Precision
from tests.conftest import CHECKPOINT
from verify import gpu, inspection, parity


class ChosenError(Exception):
    """Told the device that was set."""


def refuse(device: str) -> None:
    raise ChosenError(device)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, as far as torch says; to set one of them ends the test's call."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "set_device", refuse)


def test_a_gpu_is_recorded_with_its_model_which_does_not_tell_targets_apart(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA number {device.index}")
    target = current_target("cuda:1")
    assert (target, target.model) == (Target("cuda", "9.0"), "NVIDIA number 1")
    assert current_target("cpu").model is None


def test_a_device_is_one_of_this_machines(two_gpus: None) -> None:
    assert [checked_device(name) for name in ("cpu", "cuda", "cuda:1", None)] == ["cpu", "cuda", "cuda:1", "cuda"]
    for name in ("cuda:2", "cuda:", "cuda:01", "mps", "CUDA", ""):
        with pytest.raises(UnsupportedError, match="not on this machine; cpu, cuda, cuda:0, cuda:1 is accepted"):
            checked_device(name)


def test_a_numbered_gpu_becomes_the_current_one(two_gpus: None) -> None:
    use_device("cpu")
    use_device("cuda")
    with pytest.raises(ChosenError, match="cuda:1"):
        use_device("cuda:1")


def test_an_export_computes_on_the_gpu_it_was_told(two_gpus: None, tmp_path: Path) -> None:
    fixed = ["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", "m"]
    with pytest.raises(ChosenError, match="cuda:1"):
        cli.main([*fixed, "--device", "cuda:1"])


def test_onnx_runtime_is_for_the_cpu_unless_a_gpu_is_asked_for(
    two_gpus: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", "m", "--dry-run"]
    assert cli.main([*fixed, "--backend", "onnxruntime"]) == 0
    said = capsys.readouterr().out
    assert "onnxruntime in fp32" in said
    assert "build for  cpu" in said
    assert cli.main([*fixed, "--backend", "onnxruntime", "--device", "cuda"]) == NOT_POSSIBLE
    assert "runs on the CPU only" in capsys.readouterr().err


def test_the_checks_process_computes_on_the_gpu_it_was_told(two_gpus: None) -> None:
    package, dimensions = Path("x"), ModelDimensions(16, 192, 608)
    check = ParityCheck(
        CHECKPOINT, Component.DENOISER, Backend.AOTINDUCTOR, package, Precision.BF16, "cuda:1", dimensions, ()
    )
    with pytest.raises(ChosenError, match="cuda:1"):
        measure_parity(check)


def test_parity_computes_on_the_gpu_it_was_told(two_gpus: None, repository: Path) -> None:
    with pytest.raises(ChosenError, match="cuda:1"):
        parity.main([str(repository / "z-image-demo"), "--device", "cuda:1"])


# With the status that says that nothing was wrong with an engine; `inspect` is asked for no verdict.
COMMANDS = [(inspection.main, 1), (parity.main, NOT_POSSIBLE), (gpu.main, NOT_POSSIBLE)]


@pytest.mark.parametrize(("command", "status"), COMMANDS, ids=["inspect", "parity", "verify"])
@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_here_is_named(
    command: Callable[[Sequence[str]], int],
    status: int,
    device: str,
    repository: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = [] if command is gpu.main else [str(repository / "z-image-demo")]
    assert command([*model, "--device", device]) == status
    assert f"--device {device} is not on this machine; cpu" in capsys.readouterr().err


def test_onnx_runtime_is_not_built_for_a_gpu_it_would_not_use() -> None:
    builder = builder_for(Backend.ONNXRUNTIME, BuildOptions((Target("cuda", "9.0"),)))
    assert builder is not None
    with pytest.raises(UnsupportedError, match=r"runs on the CPU only.*give --device cpu, or --backend aotinductor"):
        builder.check(Precision.FP32)
