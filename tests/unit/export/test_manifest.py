"""What a manifest may hold, and the command that makes its engines again."""

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export import manifest as module
from export import validity
from export.cli import parser
from export.errors import ManifestError
from export.manifest import (
    Backend,
    CheckpointRecord,
    EngineRecord,
    FileRecord,
    Manifest,
    PlanRecord,
    PlanWeights,
    PreviewProjection,
    Target,
    Verbosity,
)
from export.rebuild import rebuild_command
from export.spec import Component, ModelDimensions, Precision

CPU, ADA, BLACKWELL = Target("cpu"), Target("cuda", "8.9"), Target("cuda", "12.0")
CHECKPOINT = CheckpointRecord("/data/my models/z; image", "f", ModelDimensions(16, 1, 1), 3.0)
PLAN = PlanRecord((), PlanWeights.STRIPPED, Verbosity.DETAILED, "", 0, 0)


def engine(backend: Backend, target: Target, plan: PlanRecord | None = None) -> EngineRecord:
    return EngineRecord(Component.DENOISER, backend, (FileRecord("denoiser", 0, ""),), {}, (target,), None, plan)


def manifest(record: EngineRecord) -> Manifest:
    preview = PreviewProjection((), (0.0, 0.0, 0.0))
    return Manifest("m", "now", CHECKPOINT, Precision.BF16, 2, 1024, "512x256", (record,), preview, "s")


def rebuilt(record: EngineRecord, here: Target = ADA) -> Any:
    """What `zserve export` reads in the command."""
    command = shlex.split(rebuild_command(manifest(record), Path("my repository/renamed"), record, here))
    assert command[:2] == ["zserve", "export"]
    return parser().parse_args(command[2:])


def test_the_command_says_again_what_was_asked_for() -> None:
    asked = rebuilt(engine(Backend.TENSORRT_RTX, ADA, PLAN))
    assert (asked.checkpoint, asked.repository) == ("/data/my models/z; image", Path("my repository"))
    assert (asked.name, asked.backend, asked.precision, asked.force) == ("renamed", "tensorrt_rtx", "bf16", True)
    assert (asked.max_batch, asked.max_size, asked.default_size) == (2, 1024, "512x256")
    assert (asked.strip_weights, asked.profiling_verbosity) == (True, "detailed")
    plain = rebuilt(engine(Backend.TENSORRT, ADA, replace(PLAN, weights=PlanWeights.INSIDE)))
    assert (plain.strip_weights, plain.target) == (False, None)


@pytest.mark.parametrize(
    ("backend", "built_for", "here", "target", "device"),
    [
        (Backend.TENSORRT_RTX, ADA, ADA, (ADA,), None),
        (Backend.TENSORRT_RTX, ADA, BLACKWELL, (BLACKWELL,), None),
        (Backend.TENSORRT_RTX, ADA, CPU, (ADA,), None),
        (Backend.AOTINDUCTOR, CPU, CPU, None, "cpu"),
        (Backend.AOTINDUCTOR, CPU, ADA, None, None),
        (Backend.AOTINDUCTOR, ADA, CPU, None, "cpu"),
        (Backend.AOTINDUCTOR, ADA, BLACKWELL, None, None),
        (Backend.ONNXRUNTIME, CPU, ADA, None, None),
    ],
)
def test_the_command_builds_for_what_is_here(
    backend: Backend, built_for: Target, here: Target, target: tuple[Target, ...] | None, device: str | None
) -> None:
    asked = rebuilt(engine(backend, built_for), here)
    assert (asked.target, asked.device) == (target, device)


H100, H200 = (Target("cuda", "9.0", model=f"NVIDIA {name}") for name in ("H100", "H200"))


@pytest.mark.parametrize(
    ("backend", "built_for", "here", "wrong"),
    [
        (Backend.TENSORRT, H100, H100, ""),
        (Backend.TENSORRT, H100, H200, "was built on NVIDIA H100, this is NVIDIA H200"),
        (Backend.TENSORRT, H100, ADA, "was built for cuda (compute capability 9.0), this is cuda (compute"),
        (Backend.TENSORRT_RTX, ADA, replace(ADA, model="NVIDIA L4"), ""),
        (Backend.AOTINDUCTOR, H100, H200, ""),
    ],
)
def test_only_plans_of_the_full_tensorrt_are_bound_to_a_model_of_gpu(
    backend: Backend, built_for: Target, here: Target, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validity, "installed_version", {"tensorrt": "11", "tensorrt_rtx": "1", "torch": "2"}.get)
    (tmp_path / "denoiser").write_bytes(b"an engine")
    libraries = {name: validity.installed_version(name) or "" for name in validity.BINDING_LIBRARIES[backend]}
    record = replace(engine(backend, built_for), files=(FileRecord.of(tmp_path / "denoiser"),), built_with=libraries)
    manifest(record).write(tmp_path)
    fault = validity.engine_fault(Manifest.read(tmp_path).engines[0], tmp_path, here)
    assert wrong in fault
    assert bool(fault) is bool(wrong)


def no_files(raw: Any) -> None:
    raw["engines"][0]["files"] = []


def no_size(raw: Any) -> None:
    raw["default_size"] = "abc"


@pytest.mark.parametrize("change", [no_files, no_size])
def test_what_cannot_be_meant_is_not_read(change: Callable[[Any], None], tmp_path: Path) -> None:
    manifest(engine(Backend.ONNXRUNTIME, CPU)).write(tmp_path)
    Manifest.read(tmp_path)
    file = tmp_path / "manifest.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match="does not fit format"):
        Manifest.read(tmp_path)


def test_of_large_files_only_blocks_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SAMPLED_FROM": 1000, "BLOCKS": 5, "BLOCK": 10}.items():
        monkeypatch.setattr(module, name, value)
    file, content = tmp_path / "plan", bytearray(range(250)) * 4

    def digest(change: int | None = None, size: int = 1001) -> str:
        data = (content + b"end")[:size]
        if change is not None:
            data[change] ^= 1
        file.write_bytes(data)
        return module.content_digest(file)

    assert digest(size=1000) == hashlib.sha256(content).hexdigest()
    assert digest(500, size=1000) != digest(size=1000), "of a small one all is"
    assert [digest(at) == digest() for at in (0, 9, 250, 495, 991, 1000)] == [False] * 6
    assert digest(100) == digest()
    assert digest(size=1002) != digest()
