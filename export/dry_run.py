"""`zserve export --dry-run`: what would happen, and whether it can."""

import sys
from collections.abc import Mapping
from pathlib import Path

from export.build import builder_for
from export.checks import check_listed, check_reach, check_request, may_reuse
from export.errors import SourceError
from export.estimate import GB, Estimate, check_resources, estimate, estimate_listed, free_disk
from export.hubs import Hub, Listing
from export.manifest import Backend
from export.repository import INCOMPLETE, free_version
from export.request import ExportRequest
from export.reuse import earlier_engines, published, taken_from
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
    if listing is not None and listing.incomplete:
        _say_download(request, listing)
        check_listed(request, listing)
        return
    checkpoint = _cached(request.source, listing).open()
    check_reach(request, checkpoint)
    _say(f"download   nothing; the checkpoint is {checkpoint.path}")
    earlier = earlier_engines(request, checkpoint)
    there = published(request, checkpoint, earlier)
    if there is not None:
        _say(f"version    {there.folder.name} is what is asked for; nothing is built")
        return
    held = taken_from(earlier)
    _say_version(request, held)
    needed = estimate(request, checkpoint, held)
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
    source, count = request.source, f"{len(listing.incomplete)} of {len(listing.files)} files"
    _say(f"download   {count}, {listing.missing_bytes / GB:.1f} GB, of {source.name} from {source.hub}")
    _say(f"           into {listing.cache}, where {free_disk(listing.cache) / GB:.1f} GB are free")
    reuse = "; what still holds of earlier exports is taken from them" if may_reuse(request) else ""
    _say(f"version    {_target(request)}{reuse}")
    needed = estimate_listed(request, listing)
    _say_needs(request, needed.least, needed.most)


def _say_version(request: ExportRequest, held: Mapping[Component, Path]) -> None:
    _say(f"version    {_target(request)}")
    for component, folder in held.items():
        where = "an interrupted export" if folder.name in INCOMPLETE.values() else f"version {folder.name}"
        _say(f"  {component:<15} is not built again, but taken from {where}")


def _target(request: ExportRequest) -> str:
    target = free_version(request.model, request.version, request.existing)
    return f"{target.name}, replacing the one that is there" if target.exists() else target.name


def _say_needs(request: ExportRequest, least: Estimate, most: Estimate) -> None:
    if request.backend is not Backend.EAGER:
        _say(f"build for  {', '.join(map(str, request.options.targets))}")
    for component in least.weights:
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
