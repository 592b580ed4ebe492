"""Plans without weights, shared by fine-tunes of one model: equal graphs need one plan."""

from pathlib import Path

from export.errors import ManifestError
from export.manifest import (
    FILE_NAME,
    Backend,
    EngineRecord,
    Manifest,
    PlanRecord,
    Target,
)
from export.validity import built_with, engine_fault, source_hash


def find_plan(repository: Path, backend: Backend, plan: PlanRecord, targets: tuple[Target, ...]) -> Path | None:
    """An intact plan of any model in `repository` that this code built from the same graph in the same way."""
    for manifest in sorted(repository.glob(f"*/[0-9]*/{FILE_NAME}")):
        for record in _engines(manifest.parent):
            alike = (record.backend, record.plan, record.built_for) == (backend, plan, targets)
            same = alike and record.built_with == built_with(record.built_with)
            if same and not engine_fault(record, manifest.parent, targets[0]):
                return manifest.parent / record.file
    return None


def _engines(folder: Path) -> tuple[EngineRecord, ...]:
    """The engines of a version, if the export's current code made it."""
    try:
        manifest = Manifest.read(folder)
    except ManifestError:
        return ()
    return manifest.engines if manifest.source == source_hash() else ()
