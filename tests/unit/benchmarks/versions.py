"""Versions of a model as an export leaves them, without their engines' files."""

from pathlib import Path

from benchmarks import published
from export.manifest import Backend, CheckpointRecord, EngineRecord, FileRecord, Manifest, PreviewProjection, Target
from export.spec import Component, Precision


def write_version(model: Path, backend: Backend, precision: Precision = Precision.FP32) -> Path:
    """The folder of version 1 of `model`, for images up to 64x64, with an engine of `backend` a component."""
    engines = () if backend is Backend.EAGER else tuple(_engine(component, backend) for component in Component)
    dimensions = published.dimensions()
    folder = model / "1"
    folder.mkdir(parents=True)
    Manifest(
        name=model.name,
        created="2026-01-02T03:04:05+00:00",
        checkpoint=CheckpointRecord("the/checkpoint", "0123", dimensions, published.SHIFT),
        precision=precision,
        max_batch=4,
        max_size=64,
        default_size="64x64",
        engines=engines,
        preview=PreviewProjection(((0.0, 0.0, 0.0),) * dimensions.latent_channels, (0.0, 0.0, 0.0)),
        source="4567",
    ).write(folder)
    return folder


def _engine(component: Component, backend: Backend) -> EngineRecord:
    return EngineRecord(component, backend, (FileRecord(f"{component}.bin", 0, ""),), {}, (Target("cpu"),), None)
