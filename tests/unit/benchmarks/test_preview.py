"""`zserve bench preview`: what it times."""

from pathlib import Path

import pytest
import torch

from benchmarks import preview
from export.manifest import Backend
from export.spec import Component
from server.requests import EngineUse
from server.worker.executor import Executor
from server.worker.images import Pixels
from server.worker.lanes import Pending
from server.worker.sequences import ImageSequence


class CountingExecutor(Executor):
    """Takes a second for each preview that it makes, on a clock of its own."""

    def __init__(self) -> None:
        self.now, self.previews = 0.0, 0

    def encode(self, sequence: ImageSequence) -> Pending[None]:
        return Pending(lambda: None)

    def denoise(self, sequences: list[ImageSequence]) -> Pending[float]:  # type: ignore[override]
        sequences[0].engines[Component.DENOISER] = EngineUse(Component.DENOISER, Backend.ONNXRUNTIME, "")
        self.now += 4.0
        return Pending(lambda: 4.0)

    def preview(self, sequence: ImageSequence, step: int) -> Pending[Pixels]:
        self.previews += 1
        self.now += 1.0
        return Pending(lambda: torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())


def test_each_preview_that_is_made_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One after another of the same step would find everything in the caches."""
    executor = CountingExecutor()
    monkeypatch.setattr(preview.time, "perf_counter", lambda: executor.now)
    told = preview.measure(executor, Backend.ONNXRUNTIME, 64, 5)
    assert executor.previews == 1 + 5, "the first warms up"
    assert (told["preview_ms"]["p50"], told["step_ms"]["p50"], told["share"]["p50"]) == (1000.0, 4000.0, 0.25)
