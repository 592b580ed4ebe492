"""Finds engines of earlier exports that can be reused: the newest version's, and those of an interrupted export."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from export.build.aotinductor import called_libraries
from export.checkpoint import Checkpoint
from export.devices import current_target
from export.errors import ManifestError
from export.manifest import (
    FILE_NAME,
    Backend,
    CheckpointRecord,
    EngineRecord,
    Manifest,
)
from export.repository import INCOMPLETE, Existing, versions
from export.request import ExportRequest
from export.spec import Component
from export.validity import built_with, engine_fault, source_hash

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """A version in the repository; `reused` names the engines that were not built again."""

    folder: Path
    manifest: Manifest
    reused: frozenset[Component]


Earlier = dict[Path, dict[Component, EngineRecord]]  # engines that still hold, by the folder that has them


def earlier_engines(request: ExportRequest, checkpoint: Checkpoint) -> Earlier:
    """The reusable engines of each earlier export, by folder."""
    return {folder: reusable_engines(folder, request, checkpoint) for folder in earlier_work(request)}


def published(request: ExportRequest, checkpoint: Checkpoint, earlier: Earlier) -> Exported | None:
    """The newest version, if it already satisfies the request."""
    newest = newest_kept(request)
    if newest is None or request.version is not None:
        return None
    manifest = matching_manifest(newest, request, checkpoint)
    if manifest is None or manifest.checkpoint != CheckpointRecord.of(checkpoint):
        return None
    whole = request.backend is Backend.EAGER or len(earlier.get(newest, ())) == len(Component)
    return Exported(newest, manifest, frozenset(e.component for e in manifest.engines)) if whole else None


def taken_from(earlier: Earlier) -> dict[Component, Path]:
    """The engines that need not be built, and the folder that each is taken from."""
    return {component: folder for folder in reversed(earlier) for component in earlier[folder]}


def earlier_work(request: ExportRequest) -> list[Path]:
    """Where finished engines may lie: of an interrupted export like this, then of the newest version if kept."""
    newest = newest_kept(request)
    return [request.model / INCOMPLETE[request.existing], *([] if newest is None else [newest])]


def newest_kept(request: ExportRequest) -> Path | None:
    """The folder of the newest version; None if there is none, or with --force."""
    numbers = versions(request.model)
    return request.model / str(numbers[-1]) if numbers and request.existing is Existing.KEEP else None


def matching_manifest(folder: Path, request: ExportRequest, checkpoint: Checkpoint) -> Manifest | None:
    """The manifest in `folder`, if it was exported with these settings from this checkpoint.

    The checkpoint may have been moved: engines do not depend on where it is.
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
        _elsewhere(manifest.checkpoint) == _elsewhere(CheckpointRecord.of(checkpoint))
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
    """`checkpoint` without its path."""
    return replace(checkpoint, path="")


def _is_as_asked(record: EngineRecord, request: ExportRequest) -> bool:
    """Whether it was built as this request would build it.

    An engine never compared with eager is not accepted if this machine can compare it.
    """
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
    fault = engine_fault(record, folder, request.options.targets[0])
    if fault:
        log.warning("%s; it is built again", fault)
    return not fault
