"""What of earlier exports still holds: the newest version's engines, and those an interrupted export had finished."""

import logging
from pathlib import Path

import torch

from export.build.aotinductor import called_libraries
from export.checkpoint import Checkpoint
from export.devices import current_target
from export.errors import ManifestError, StaleEngineError
from export.manifest import (
    FILE_NAME,
    Backend,
    EngineRecord,
    Manifest,
    built_with,
    check_engine,
    checkpoint_record,
    source_hash,
)
from export.request import ExportRequest
from export.spec import Component

log = logging.getLogger(__name__)


def matching_manifest(folder: Path, request: ExportRequest, checkpoint: Checkpoint) -> Manifest | None:
    """The manifest in `folder`, if what it tells of was exported from this checkpoint with these settings."""
    if not (folder / FILE_NAME).is_file():
        return None
    try:
        manifest = Manifest.read(folder)
    except ManifestError as error:
        log.warning("%s", error)
        return None
    serving = request.serving
    same = (
        manifest.checkpoint == checkpoint_record(checkpoint)
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


def is_whole(engines: dict[Component, EngineRecord], backend: Backend) -> bool:
    """Whether a version of which `engines` still hold needs nothing more."""
    return backend is Backend.EAGER or len(engines) == len(Component)


def runs_here(request: ExportRequest) -> bool:
    """Whether the device here is one of those that the engines are built for."""
    return current_target(request.device) in request.options.targets


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
