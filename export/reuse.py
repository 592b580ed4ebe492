"""What of earlier exports still holds: the newest version's engines, and those an interrupted export had finished."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from export.build.aotinductor import called_libraries
from export.checkpoint import Checkpoint
from export.devices import current_target
from export.errors import ManifestError, StaleEngineError
from export.manifest import (
    FILE_NAME,
    Backend,
    CheckpointRecord,
    EngineRecord,
    Manifest,
    built_with,
    check_engine,
    checkpoint_record,
    source_hash,
)
from export.repository import INCOMPLETE, Existing, versions
from export.request import ExportRequest
from export.spec import Component

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A version that is what an export asks for."""

    folder: Path
    manifest: Manifest


Earlier = dict[Path, dict[Component, EngineRecord]]  # engines that still hold, by the folder that has them


def earlier_engines(request: ExportRequest, checkpoint: Checkpoint) -> Earlier:
    """What of earlier exports this one would build again just the same."""
    return {folder: reusable_engines(folder, request, checkpoint) for folder in earlier_work(request)}


def published(request: ExportRequest, checkpoint: Checkpoint, earlier: Earlier) -> Published | None:
    """The newest version, if it is what is asked for, and the server will read this checkpoint with it."""
    newest = newest_kept(request)
    if newest is None or request.version is not None:
        return None
    manifest = matching_manifest(newest, request, checkpoint)
    if manifest is None or manifest.checkpoint != checkpoint_record(checkpoint):
        return None
    whole = request.backend is Backend.EAGER or len(earlier.get(newest, ())) == len(Component)
    return Published(newest, manifest) if whole else None


def taken_from(earlier: Earlier) -> dict[Component, Path]:
    """The engines that need not be built, and the folder that each is taken from."""
    return {component: folder for folder in reversed(earlier) for component in earlier[folder]}


def earlier_work(request: ExportRequest) -> list[Path]:
    """Where finished engines may lie: of an interrupted export like this, then of the newest version if kept."""
    newest = newest_kept(request)
    return [request.model / INCOMPLETE[request.existing], *([] if newest is None else [newest])]


def newest_kept(request: ExportRequest) -> Path | None:
    """The folder of the newest version, unless nothing there is to be kept."""
    numbers = versions(request.model)
    return request.model / str(numbers[-1]) if numbers and request.existing is Existing.KEEP else None


def matching_manifest(folder: Path, request: ExportRequest, checkpoint: Checkpoint) -> Manifest | None:
    """The manifest in `folder`, if what it tells of was exported with these settings from this checkpoint.

    It may lie elsewhere now: engines do not depend on that.
    """
    if not (folder / FILE_NAME).is_file():
        return None
    try:
        manifest = Manifest.read(folder)
    except ManifestError as error:
        log.warning("%s", error)
        return None
    serving = request.serving
    same = (
        _elsewhere(manifest.checkpoint) == _elsewhere(checkpoint_record(checkpoint))
        and manifest.precision is request.precision
        and (manifest.max_batch, manifest.max_size) == (serving.max_batch, serving.max_size)
        and manifest.default_size == serving.default_size
        and manifest.source == source_hash()
        and {e.backend for e in manifest.engines} <= {request.backend}
    )
    return manifest if same else None


def reusable_engines(folder: Path, request: ExportRequest, checkpoint: Checkpoint) -> dict[Component, EngineRecord]:
    """The engines in `folder` that this export would build again just the same."""
    manifest = matching_manifest(folder, request, checkpoint)
    if manifest is None:
        return {}
    return {e.component: e for e in manifest.engines if _is_as_asked(e, request) and _still_holds(e, folder, request)}


def runs_here(request: ExportRequest) -> bool:
    """Whether the device here is one of those that the engines are built for."""
    return current_target(request.device) in request.options.targets


def _elsewhere(checkpoint: CheckpointRecord) -> CheckpointRecord:
    """The same, wherever it is."""
    return replace(checkpoint, path="")


def _is_as_asked(record: EngineRecord, request: ExportRequest) -> bool:
    """An engine that no machine has run yet is not, where it can be run."""
    options, plan = request.options, record.plan
    return (
        record.built_for == options.targets
        and record.built_with == built_with((*record.built_with, *_called(record, request)))
        and (record.parity is not None or not runs_here(request))
        and (
            plan is None
            or (plan.profiles, plan.weights, plan.verbosity) == (request.profiles, options.weights, options.verbosity)
        )
    )


def _called(record: EngineRecord, request: ExportRequest) -> tuple[str, ...]:
    """What the engine would call if it were built again; a library may have been installed since."""
    if record.backend is not Backend.AOTINDUCTOR:
        return ()
    return called_libraries(record.component, request.precision, torch.device(request.device))


def _still_holds(record: EngineRecord, folder: Path, request: ExportRequest) -> bool:
    try:
        check_engine(record, folder, request.options.targets[0], "it is built again now")
    except StaleEngineError as error:
        log.warning("%s", error)
        return False
    return True
