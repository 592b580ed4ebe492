"""Plans without weights, shared by fine-tunes of one model: equal graphs need one plan."""

from pathlib import Path

from export.errors import ManifestError
from export.manifest import FILE_NAME, EngineRecord, Manifest, PlanRecord, Target, check_engine


def find_plan(repository: Path, plan: PlanRecord, targets: tuple[Target, ...]) -> Path | None:
    """A whole plan of any model in `repository` that was built from the same graph in the same way."""
    for manifest in sorted(repository.glob(f"*/[0-9]*/{FILE_NAME}")):
        for record in _engines(manifest.parent):
            if record.plan == plan and record.built_for == targets and _holds(record, manifest.parent):
                return manifest.parent / record.file
    return None


def _engines(folder: Path) -> tuple[EngineRecord, ...]:
    try:
        return Manifest.read(folder).engines
    except ManifestError:
        return ()


def _holds(record: EngineRecord, folder: Path) -> bool:
    try:
        check_engine(record, folder, record.built_for[0], "")
    except ManifestError:
        return False
    return True
