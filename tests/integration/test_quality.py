"""`benchmarks.quality` on few small pictures, with the real engines."""

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from export.errors import UnsupportedError
from export.manifest import Backend, Manifest
from export.repository import versions
from export.spec import Precision
from server.config import FallbackPolicy
from server.engines.eager import EagerModules
from server.errors import EngineLoadError
from tests.conftest import CHECKPOINT, MODEL
from verify.painter import Painter
from verify.version import load_engines


def test_every_engine_is_compared_or_says_why_not(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repository / MODEL / str(versions(repository / MODEL)[-1])
    exported = Manifest.read(folder)

    def load(variant: quality.Variant, options: argparse.Namespace) -> Painter:
        if variant.backend is Backend.AOTINDUCTOR:
            raise UnsupportedError("no compiler here")
        manifest = exported if variant.backend is Backend.ONNXRUNTIME else replace(exported, engines=())
        manifest = replace(manifest, precision=variant.precision)
        modules = EagerModules(CHECKPOINT, variant.precision, "cpu")
        return Painter(manifest, load_engines(folder, manifest, modules, FallbackPolicy.REFUSE), "cpu")

    size = (64, 80)
    changes = {"load": load, "SMALL": size, "GRIDS": {"quick": (size,)}, "STEPS": 2, "OTHER_STEPS": 3}
    for name, value in changes.items():
        monkeypatch.setattr(quality, name, value)
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    record = quality.run(parser.parse_args(["--images", "3", "--device", "cpu", "--sheets", str(tmp_path)]))

    rows = {(row["case"]["engine"], row["case"]["against"]): row for row in record["rows"]}
    assert {row["not_run"] for (engine, _), row in rows.items() if "aotinductor" in engine} == {"no compiler here"}
    measured = {key: row["likeness"] for key, row in rows.items() if not row["not_run"]}
    assert len(measured) == 12
    assert measured["eager fp32", "eager fp32"]["largest_difference"] == 0
    assert measured["onnxruntime fp32", "eager fp32"]["largest_difference"] <= 1
    assert measured["eager bf16", "eager fp32"]["largest_difference"] > 1
    for engine in ("eager fp32", "eager bf16", "onnxruntime fp32"):
        assert measured[engine, "cached prompts"]["worst_psnr"] is None
        assert (
            measured[engine, "batches of 4"]["worst_psnr"] is None
            or measured[engine, "batches of 4"]["worst_psnr"] > measured[engine, "3 steps"]["worst_psnr"]
        )
    table = capsys.readouterr().out
    assert "not run: no compiler here" in table
    assert record["failed"] == []
    assert (tmp_path / "quality_cpu.png").exists()
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(("status", "error"), [(1, EngineLoadError), (-9, EngineLoadError), (3, UnsupportedError)])
def test_an_export_that_fails_is_told_from_one_that_is_not_possible(
    status: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, status, "", "zserve export: the denoiser differs from eager\n")

    monkeypatch.setattr(quality.subprocess, "run", run)
    options = argparse.Namespace(repository=tmp_path, device="cpu")
    with pytest.raises(error, match="the denoiser differs from eager"):
        quality.load(quality.Variant(Backend.AOTINDUCTOR, Precision.BF16), options)


def test_without_eager_there_is_nothing_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is a line; eager ends the run."""

    def load(variant: quality.Variant, options: argparse.Namespace) -> Painter:
        raise EngineLoadError("no memory")

    monkeypatch.setattr(quality, "load", load)
    options = argparse.Namespace()
    ((row, _, _),) = quality.measure(quality.Variant(Backend.AOTINDUCTOR, Precision.BF16), [], {}, options)
    assert (row.not_run, row.possible) == ("no memory", True)
    for variant in (quality.REFERENCE, quality.EAGER_BF16):
        with pytest.raises(EngineLoadError, match="no memory"):
            list(quality.measure(variant, [], {}, options))


def test_an_unknown_engine_is_told_what_is_accepted() -> None:
    options = argparse.Namespace(device="cpu", only=["onnxruntime fp16"])
    with pytest.raises(SystemExit, match=r"onnxruntime fp16: .*onnxruntime fp32.* are accepted"):
        quality.variants(options)
