"""What is said where AOTInductor cannot compile."""

import errno
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pytest
import torch
from torch import nn
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch.export import ExportedProgram

from export.build.aotinductor import AotInductorBuilder
from export.build.base import BuildInputs
from export.errors import BuildError, ResourcesError, UnsupportedError
from export.onnx import GraphLimits, GraphSource
from export.spec import EXPORT_EXAMPLE, Component, ModelDimensions, Precision, ShapePoint, component_specs

DIMENSIONS = ModelDimensions(16, 192, 608)


@dataclass(frozen=True)
class NoProgram(BuildInputs):
    """Is traced at once, as what compiles it looks at nothing."""

    def program(self, module: nn.Module, example: ShapePoint = EXPORT_EXAMPLE) -> ExportedProgram:
        return cast(ExportedProgram, module)


@pytest.fixture
def inputs() -> BuildInputs:
    source = GraphSource(Path(), DIMENSIONS, Precision.FP32, GraphLimits(2, 320))
    return NoProgram(source, component_specs(DIMENSIONS)[Component.DENOISER], (), Path(), lambda: nn.Linear(1, 1))


def ends_with(error: Exception) -> Callable[..., None]:
    def compile_it(*_: object, **__: object) -> None:
        raise error

    return compile_it


def test_folders_that_inductors_commands_break_at_are_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builder = AotInductorBuilder()
    for where, name, folder in ((torch, "__file__", "/my venv/torch/__init__.py"), (tempfile, "tempdir", "/my tmp")):
        with monkeypatch.context() as here:
            here.setattr(where, name, folder)
            with pytest.raises(UnsupportedError, match=rf"no spaces.*{folder}.*TMPDIR.*environment"):
                builder.check(Precision.FP32)
    with monkeypatch.context() as here:
        here.setenv("TORCHINDUCTOR_CACHE_DIR", "/my cache")
        with pytest.raises(UnsupportedError, match="/my cache"):
            builder.check(Precision.FP32)
        here.setenv("TORCHINDUCTOR_CACHE_DIR", "/mein-Cache-für-Inductor")
        builder.check(Precision.FP32)


@pytest.mark.parametrize(
    "error",
    [
        InductorError(InvalidCxxCompiler("g++"), None),
        InductorError(OSError("CUDA_HOME environment variable is not set"), None),
        OSError("CUDA_HOME environment variable is not set"),
    ],
)
def test_a_compiler_that_is_not_there_is_named_with_the_remedy(
    error: Exception, inputs: BuildInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", ends_with(error))
    with pytest.raises(BuildError, match=r"could not compile denoiser: .*(g\+\+|CUDA_HOME).* needs a C\+\+ compiler"):
        AotInductorBuilder().build(inputs, Path())


def test_what_says_nothing_of_compilers_gives_no_such_advice(
    inputs: BuildInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = InductorError(AssertionError("so it is not"), None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", ends_with(error))
    with pytest.raises(BuildError, match=r"could not compile denoiser: AssertionError: so it is not$"):
        AotInductorBuilder().build(inputs, Path())


def test_a_full_device_is_not_the_compilers_fault(inputs: BuildInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    cause = torch.OutOfMemoryError("no room")
    for error in (cause, InductorError(cause, None)):
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", ends_with(error))
        with pytest.raises(torch.OutOfMemoryError) as caught:
            AotInductorBuilder().build(inputs, Path())
        assert caught.value is cause


@pytest.mark.parametrize(
    "cause",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        CppCompileError(["g++", "x.hpp"], "fatal error: when writing to /tmp/x.i: No space left on device\nended."),
    ],
)
def test_a_disk_that_is_full_of_what_is_compiled_is_not_the_compilers_fault(
    cause: Exception, inputs: BuildInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (cause, InductorError(cause, None)):
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", ends_with(error))
        with pytest.raises(ResourcesError, match=r"^AOT.* denoiser: .*No space left on device; .* set TMPDIR .* disk$"):
            AotInductorBuilder().build(inputs, Path())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is Linux's")
def test_a_package_that_the_disk_has_no_room_for_is_an_error(
    inputs: BuildInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_it(program: object, *, package_path: IO[bytes] | str, **_: object) -> None:
        assert not isinstance(package_path, str), "torch's own writer ends the process when it cannot write"
        package_path.write(b"package")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_it)
    (tmp_path / "denoiser.pt2").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        AotInductorBuilder().build(inputs, tmp_path)
