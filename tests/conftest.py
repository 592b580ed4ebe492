"""Fixtures shared by all tests: the demo checkpoint, diffusers' own pipeline over it, and an exported repository."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "demo" / "checkpoint"
# Kept between runs: an export is reused only while the manifest still fits the checkpoint, the code and the libraries.
REPOSITORY = ROOT / "build" / "test-models"
MODEL = "z-image-demo"
DEMO_MODEL = ROOT / "models" / MODEL  # what `make demo` has exported, if it has run
TENSORRT_REPOSITORY = ROOT / "build" / "test-models-tensorrt"


def share_of_cores() -> set[int]:
    """Of the cores that there are, those of this test process and of what it starts; all where it is the only one.

    Where servers of two processes compute on the same cores, the threads of each wait for those of the other.
    """
    cores = sorted(os.sched_getaffinity(0))
    number, count = (
        int(os.environ.get(f"PYTEST_XDIST_{name}", "0").strip("gw")) for name in ("WORKER", "WORKER_COUNT")
    )
    return set(cores[number :: max(1, count)]) or {cores[number % len(cores)]}


os.sched_setaffinity(0, share_of_cores())
# Models as small as the demo's gain little from a second thread, and wait for it long where it has much else to do.
torch.set_num_threads(1)


def load_pipeline(dtype: torch.dtype) -> ZImagePipeline:
    """diffusers' own pipeline over the demo checkpoint, without its progress bars."""
    pipeline = ZImagePipeline.from_pretrained(CHECKPOINT, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def pipeline() -> ZImagePipeline:
    """The demo checkpoint in diffusers, fp32: what everything here is held against."""
    return load_pipeline(torch.float32)


def run_export(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`zserve export` of the demo checkpoint in a process of its own."""
    command = [sys.executable, "-m", "zserve", "export", "--checkpoint", str(CHECKPOINT), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def exported(repository: Path, backend: str, *options: str, name: str = MODEL, earlier: Path | None = None) -> Path:
    """`repository` with the demo model on `backend`; where two test processes want it, one exports and one waits.

    `earlier`: a folder of the same model, whose engines the export takes where it would build them just the same.
    """
    repository.parent.mkdir(parents=True, exist_ok=True)
    with repository.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if earlier is not None and earlier.is_dir() and not (repository / name).exists():
            shutil.copytree(earlier, repository / name)
        done = run_export(
            "--repository", str(repository), "--name", name, "--backend", backend, "--default-size", "256x256", *options
        )
    assert done.returncode == 0, done.stderr
    return repository


@pytest.fixture(scope="session")
def repository() -> Path:
    """A model repository with the demo model on ONNX Runtime."""
    return exported(REPOSITORY, "onnxruntime", earlier=DEMO_MODEL)


def copy_model(repository: Path, models: Path) -> Path:
    """The newest version of the demo model as version 1 in the repository `models`, which a test may break.

    It warms up one small size without batches, in half the time. Returns the model's folder.
    """
    model = models / MODEL
    versions = [p for p in (repository / MODEL).iterdir() if p.name.isdecimal()]
    shutil.copytree(max(versions, key=lambda p: int(p.name)), model / "1")
    config = (repository / MODEL / "config.pbtxt").read_text()
    small = config.replace('"256x256"', '"64x64"').replace("max_batch_size: 4", "max_batch_size: 1")
    (model / "config.pbtxt").write_text(small)
    return model


@pytest.fixture(scope="session")
def tensorrt_repository() -> Path:
    """The demo model as TensorRT-RTX plans for two kinds of GPU, neither of which is here."""
    return exported(TENSORRT_REPOSITORY, "tensorrt_rtx", "--target", "sm89,sm120")
