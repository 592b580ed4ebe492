"""What a worker process does to itself before it loads anything."""

import os

import pytest

from server.errors import EngineLoadError
from server.worker.main import _device, _see_only


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
