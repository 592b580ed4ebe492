"""What a worker process does to itself before it loads anything."""

import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.config import ModelConfig
from server.errors import ConfigError, EngineLoadError
from server.worker import main as worker
from server.worker.main import _as_exported, _device, _see_only


@pytest.mark.parametrize(
    ("device", "before", "after"),
    [("cuda:1", None, "1"), ("cuda:1", "4,7", "7"), ("cuda:2", "4,7", ""), ("cuda", "4,7", "4,7"), ("cpu", None, None)],
)
def test_a_worker_sees_its_own_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, device: str, before: str | None, after: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    assert _see_only(device) == device.partition(":")[0]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == after
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EngineLoadError, match=f"there is no {device} here"):
        _device(device)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            r"not enough memory to start \(.*\): CUDA out of memory\.$",
        ),
        (FileNotFoundError(2, "No such file", "tokenizer.json"), r"No such file: 'tokenizer.json'$"),
    ],
)
def test_why_a_worker_cannot_start_is_the_last_it_says(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(config: object, parts: object) -> None:
        raise error

    assert _started(monkeypatch, build) == 1
    assert re.search(said, capsys.readouterr().out.rstrip("\n"))


def test_what_a_worker_has_loaded_is_out_of_collections_before_it_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full collection takes Python's lock for 0.1 to 0.3 s once torch, diffusers and transformers are there."""
    loaded: list[object] = []
    served: list[bool] = []

    stopped: list[object] = []

    def build(config: object, parts: object) -> object:
        loaded.append([])
        return SimpleNamespace(loaded=loaded, end_requests=None, stop=lambda: stopped.append(served[:]))

    async def serve(service: object, socket: object, end_requests: object) -> None:
        served.append(any(one is loaded[0] for one in gc.get_objects()))

    monkeypatch.setattr(worker, "serve", serve)
    try:
        with caplog.at_level("INFO"):
            assert _started(monkeypatch, build) == 0
    finally:
        gc.unfreeze()
    assert served == [False]
    assert stopped == [[False]], "once, when it serves no more"
    assert re.search(r"ready after [\d.]+ s: heap [\d.]+", caplog.text)


def _started(monkeypatch: pytest.MonkeyPatch, build: Callable[[object, object], object]) -> int:
    """The status of a worker's `main`, which loads by `build`."""
    monkeypatch.setattr(worker, "build_service", build)
    config = SimpleNamespace(instance="m-0", socket=Path(), log=SimpleNamespace(apply=lambda who: None))
    monkeypatch.setattr(worker.WorkerConfig, "parse", lambda arguments: config)
    monkeypatch.setattr(sys, "argv", ["worker"])
    return worker.main()


def test_batches_are_no_larger_than_the_engines_take(caplog: pytest.LogCaptureFixture) -> None:
    """config.pbtxt is the operator's, and stays as it is when the model is exported anew."""
    manifest: Any = SimpleNamespace(max_batch=2, max_size=2048)
    checkpoint: Any = SimpleNamespace(max_size=8192)
    assert _as_exported(ModelConfig(name="demo", max_batch_size=4), manifest, checkpoint).max_batch_size == 2
    assert "exported with --max-batch 2" in caplog.text
    assert _as_exported(ModelConfig(name="demo", max_batch_size=1), manifest, checkpoint).max_batch_size == 1


def test_sizes_are_no_larger_than_the_checkpoint_draws(caplog: pytest.LogCaptureFixture) -> None:
    """Where engines do not reach, eager does, so that is only said."""
    manifest: Any = SimpleNamespace(max_batch=4, max_size=1024)
    checkpoint: Any = SimpleNamespace(max_size=8192)
    assert _as_exported(ModelConfig(name="demo", max_size=1024), manifest, checkpoint).max_size == 1024
    assert not caplog.text
    assert _as_exported(ModelConfig(name="demo", max_size=8192), manifest, checkpoint).max_size == 8192
    assert "exported with --max-size 1024" in caplog.text
    with pytest.raises(ConfigError, match="max_size 8208, and the checkpoint draws up to 8192 pixels a side"):
        _as_exported(ModelConfig(name="demo", max_size=8208), manifest, checkpoint)
