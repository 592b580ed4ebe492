"""`zserve export --dry-run`: what would happen, and whether it can."""

import sys
from pathlib import Path

from export.build import builder_for
from export.checkpoint import Checkpoint
from export.checks import check_download, check_reach, check_request, earlier_work, may_reuse
from export.errors import SourceError
from export.estimate import GB, Estimate, check_resources, estimate, estimate_listed, free_disk
from export.hubs import Hub, Listing
from export.manifest import Backend
from export.repository import INCOMPLETE, Existing, free_version, versions
from export.request import ExportRequest
from export.reuse import is_whole, matching_manifest, reusable_engines
from export.sources import Source
from export.spec import Component


def print_dry_run(request: ExportRequest) -> None:
    """Prints the plan of an export.

    Raises:
        ExportError: as the export itself would before it builds anything.
    """
    check_request(request, builder_for(request.backend, request.options))
    _say(f"{request.model}: {request.backend} in {request.precision}")
    listing = _listing(request.source)
    if listing is not None and listing.missing:
        _say_download(request, listing)
        check_download(request)
        return
    checkpoint = _cached(request.source, listing).open()
    check_reach(request, checkpoint)
    _say(f"download   nothing; the checkpoint is {checkpoint.path}")
    if _is_published(request, checkpoint):
        _say(f"version    {versions(request.model)[-1]} is what is asked for; nothing is built")
        return
    _say_version(request, checkpoint)
    needed = estimate(request, checkpoint)
    _say_needs(request, needed, needed)
    check_resources(needed, request.repository)


def _listing(source: Source) -> Listing | None:
    """What the hub has; None where it cannot say, and what is cached will do."""
    try:
        return source.listing()
    except SourceError as unreachable:
        try:
            source.cached().fetch()
        except SourceError:
            raise unreachable from None
        return None


def _cached(source: Source, listing: Listing | None) -> Source:
    """With every file in Hugging Face's cache the folder of links to them may still have to be made, so it is asked."""
    return source if listing is not None and source.hub is Hub.HUGGINGFACE else source.cached()


def _say_download(request: ExportRequest, listing: Listing) -> None:
    source, count = request.source, f"{len(listing.missing)} of {len(listing.files)} files"
    _say(f"download   {count}, {listing.missing_bytes / GB:.1f} GB, of {source.name} from {source.hub}")
    _say(f"           into {listing.cache}, where {free_disk(listing.cache) / GB:.1f} GB are free")
    reuse = "; what still holds of earlier exports is taken from them" if may_reuse(request) else ""
    _say(f"version    {_target(request)}{reuse}")
    needed = estimate_listed(request, listing)
    _say_needs(request, needed.least, needed.most)


def _is_published(request: ExportRequest, checkpoint: Checkpoint) -> bool:
    """Whether the newest version is what is asked for."""
    numbers = versions(request.model)
    if request.existing is not Existing.KEEP or request.version is not None or not numbers:
        return False
    newest = request.model / str(numbers[-1])
    manifest = matching_manifest(newest, request, checkpoint)
    return manifest is not None and is_whole(reusable_engines(newest, request, checkpoint), request.backend)


def _say_version(request: ExportRequest, checkpoint: Checkpoint) -> None:
    _say(f"version    {_target(request)}")
    for component, folder in _reused(request, checkpoint).items():
        where = "an interrupted export" if folder.name in INCOMPLETE.values() else f"version {folder.name}"
        _say(f"  {component:<15} is not built again, but taken from {where}")


def _target(request: ExportRequest) -> str:
    target = free_version(request.model, request.version, request.existing)
    return f"{target.name}, replacing the one that is there" if target.exists() else target.name


def _reused(request: ExportRequest, checkpoint: Checkpoint) -> dict[Component, Path]:
    """The engines that would not be built, and the folders that have them."""
    held: dict[Component, Path] = {}
    for folder in earlier_work(request):
        for component in reusable_engines(folder, request, checkpoint):
            held.setdefault(component, folder)
    return held


def _say_needs(request: ExportRequest, least: Estimate, most: Estimate) -> None:
    if request.backend is not Backend.EAGER:
        _say(f"build for  {', '.join(map(str, request.options.targets))}")
    for component in Component:
        weights = _range(least.weights[component], most.weights[component])
        _say(f"  {component:<15} weights {weights}  engine up to {most.engines[component] / GB:7.2f} GB")
    free = free_disk(request.repository) / GB
    _say(f"disk      {_range(least.disk, most.disk)} in {request.repository}, where {free:.1f} GB are free")
    _say(f"memory    {_range(least.memory, most.memory)}")


def _range(least: int, most: int) -> str:
    """In GB; one number where both are the same."""
    low = "" if least == most else f"{least / GB:7.2f} to"
    return f"{low}{most / GB:7.2f} GB"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
