"""The export stage from end to end: checkpoint -> checked engines -> a published version."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import nn

from export.build import Builder, BuildInputs, builder_for
from export.checkpoint import Checkpoint, open_checkpoint
from export.checks import check_download, check_reach, check_request, may_reuse
from export.errors import BuildError, CheckpointError, ResourcesError
from export.estimate import check_resources, estimate
from export.manifest import (
    FILE_NAME,
    CheckpointRecord,
    EngineRecord,
    FileRecord,
    Manifest,
    Parity,
)
from export.memory import released_afterwards
from export.modules import load_components
from export.onnx import GraphSource
from export.parity import Checker, ParityCheck
from export.preview import fit_preview
from export.profiles import parity_points
from export.repository import Existing, locked, new_version, remove, take, write_config
from export.request import ExportRequest
from export.reuse import Earlier, Exported, earlier_engines, published, runs_here, taken_from
from export.spec import Component, ComponentSpec, component_specs
from export.validity import built_with, source_hash

# How long building a component takes relative to the others, for the time left on the progress bar.
SHARES = {Component.PROMPT_ENCODER: 2, Component.DENOISER: 5, Component.IMAGE_DECODER: 3}

Report = Callable[[str, int], None]  # a stage's name as it begins, and the share of the work done before it


def export_model(request: ExportRequest, report: Report) -> Exported:
    """Publishes a version with an engine for every component, reusing those of earlier exports that still hold.

    An export that ends before its time keeps the engines it had finished for the next one of the same request.

    Raises:
        ExportError: the checkpoint is broken, or an engine could not be built or differs from eager. Nothing is
            published then.
    """
    report("checking the checkpoint", 0)
    builder = builder_for(request.backend, request.options)
    check_request(request, builder)
    check_download(request)
    checkpoint = request.source.open()
    check_reach(request, checkpoint)
    if not may_reuse(request):
        check_resources(estimate(request, checkpoint), request.repository)  # before the model's folder is made
    with locked(request.model):
        earlier = earlier_engines(request, checkpoint)
        there = published(request, checkpoint, earlier)
        if there is not None:
            write_config(request.model, request.serving)  # it may have been deleted, to be written anew
            return there
        check_resources(estimate(request, checkpoint, taken_from(earlier)), request.repository)
        with new_version(request.model, request.version, request.existing) as (folder, target):
            version = _Version(request, checkpoint, earlier, folder, report)
            manifest = version.assemble(builder)
            write_config(request.model, request.serving)
            report("publishing", sum(SHARES.values()))
    return Exported(target, manifest, frozenset(taken_from(earlier)))


@dataclass(frozen=True)
class _Version:
    """One version being put together in `folder`."""

    request: ExportRequest
    checkpoint: Checkpoint
    earlier: Earlier
    folder: Path
    report: Report

    def assemble(self, builder: Builder | None) -> Manifest:
        """Fills the folder; its manifest always holds what is finished so far."""
        self.report("fitting the preview projection", 0)
        empty = self._empty_manifest()
        kept = self._take_earlier()
        manifest = self._write(empty, kept)
        if builder is not None:
            jobs = _Jobs(self, builder, frozenset(Component) - kept.keys())
            for record in jobs.build():
                manifest = self._write(manifest, {e.component: e for e in (*manifest.engines, record)})
        return manifest

    def _empty_manifest(self) -> Manifest:
        request = self.request
        return Manifest(
            name=request.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            checkpoint=CheckpointRecord.of(self.checkpoint),
            precision=request.precision,
            max_batch=request.serving.max_batch,
            max_size=request.serving.max_size,
            default_size=request.serving.default_size,
            engines=(),
            preview=fit_preview(self.checkpoint.path),
            source=source_hash(),
        )

    def _take_earlier(self) -> dict[Component, EngineRecord]:
        """Puts the reusable engines into the folder; all else in it goes, but the manifest until it is written anew."""
        sources = taken_from(self.earlier)
        kept = {component: self.earlier[source][component] for component, source in sources.items()}
        files = [sources[component] / file.name for component, record in kept.items() for file in record.files]
        there = {FILE_NAME, *(file.name for file in files if file.parent == self.folder)}
        for path in self.folder.iterdir():
            if path.name not in there:
                remove(path)
        take((file for file in files if file.parent != self.folder), self.folder)
        return kept

    def _write(self, manifest: Manifest, engines: Mapping[Component, EngineRecord]) -> Manifest:
        written = replace(manifest, engines=tuple(engines[c] for c in Component if c in engines))
        written.write(self.folder)
        return written


@dataclass(frozen=True)
class _Jobs:
    """The engines of a version that have to be built."""

    version: _Version
    builder: Builder
    missing: frozenset[Component]

    def build(self) -> Iterator[EngineRecord]:
        """Builds, checks and records one after the other."""
        request = self.version.request
        done = 0
        with Checker() if self.missing and runs_here(request) else nullcontext() as checker:
            for component in Component:
                if component in self.missing:
                    yield self._build_one(component, checker, done)
                done += SHARES[component]

    def _read_module(self, component: Component) -> nn.Module:
        """One component alone: the default export of the published model has to fit on a GPU beside no other."""
        request = self.version.request
        modules = load_components(
            self.version.checkpoint.path, precision=request.precision, device=request.device, wanted=[component]
        )
        return modules[component]

    def _build_one(
        self,
        component: Component,
        checker: Checker | None,  # None: built for other devices than the one here
        done: int,
    ) -> EngineRecord:
        version, request = self.version, self.version.request
        report = partial(version.report, f"building {component}", done)
        report()
        spec = component_specs(version.checkpoint.dimensions)[component]
        source = GraphSource(version.checkpoint.path, version.checkpoint.dimensions, request.precision, request.limits)
        with released_afterwards(partial(self._read_module, component)) as module:
            share_plans_in = None if request.existing is Existing.REPLACE else request.repository
            inputs = BuildInputs(
                source=source,
                spec=spec,
                profiles=request.profiles,
                repository=share_plans_in,
                module=module,
                report=report,
            )
            try:
                built = self.builder.build(inputs, version.folder)
            except torch.OutOfMemoryError as error:
                raise ResourcesError(
                    f"{request.device} has too little memory to build {component} ({str(error).splitlines()[0]}); end "
                    "what else takes it there, or export where there is more"
                ) from error
            except RuntimeError as error:
                raise BuildError(f"{request.backend} could not build {component}: {error}") from error
        self._check_unchanged(component)
        version.report(f"checking {component}", done + SHARES[component] // 2)
        return EngineRecord(
            component=component,
            backend=request.backend,
            files=tuple(FileRecord.of(path) for path in built.files),
            built_with=built_with((*self.builder.libraries, *built.calls)),
            built_for=request.options.targets,
            parity=None if checker is None else self._parity(checker, spec, built.files[0]),
            plan=built.plan,
            instructions=built.instructions,
        )

    def _check_unchanged(self, component: Component) -> None:
        """Raises `CheckpointError` where an engine may have other weights than those that the manifest names."""
        checkpoint = self.version.checkpoint
        if open_checkpoint(checkpoint.path) != checkpoint:
            raise CheckpointError(
                f"{checkpoint.path} has changed while {component} was built; when nothing writes to it any more, run "
                "the same command again"
            )

    def _parity(self, checker: Checker, spec: ComponentSpec, path: Path) -> Parity:
        """How close the engine is to eager."""
        request = self.version.request
        check = ParityCheck(
            checkpoint=self.version.checkpoint.path,
            component=spec.component,
            backend=request.backend,
            file=path,
            precision=request.precision,
            device=request.device,
            dimensions=self.version.checkpoint.dimensions,
            points=parity_points(request.serving.default_pixels, request.limits.max_rows, request.limits.max_size),
        )
        return checker.check(check, spec.tolerance[request.precision])
