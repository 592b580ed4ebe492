"""`zserve export --dry-run`: what would happen, and whether it can."""

import sys

from export.build import builder_for
from export.checkpoint import Checkpoint
from export.checks import check_reach, check_request
from export.errors import SourceError
from export.estimate import GB, check_resources, estimate, free_disk
from export.manifest import Backend
from export.request import ExportRequest
from export.spec import Component


def print_dry_run(request: ExportRequest) -> None:
    """Prints the plan of an export.

    Raises:
        ExportError: as the export itself would before it builds anything.
    """
    builder = builder_for(request.backend, request.options)
    check_request(request, builder)
    _say(f"{request.model}: {request.backend} in {request.precision}")
    try:
        checkpoint = request.source.cached().open()
    except SourceError:
        _say(f"download   {request.source.name} from {request.source.hub}, as nothing of it is cached:")
        _say(f"           {request.source.repair_command()}")
        _say("           What is to be built from it, and what that needs, can be told when it is there")
        return
    check_reach(request, checkpoint)
    _say(f"download   nothing; the checkpoint is {checkpoint.path}")
    _say_builds(request, checkpoint)


def _say_builds(request: ExportRequest, checkpoint: Checkpoint) -> None:
    needed = estimate(request, checkpoint)
    if request.backend is not Backend.EAGER:
        _say(f"build for  {', '.join(map(str, request.options.targets))}")
    for component in Component:
        weights, engine = needed.weights[component] / GB, needed.engines[component] / GB
        _say(f"  {component:<15} weights {weights:7.2f} GB  engine up to {engine:7.2f} GB")
    _say(f"disk       {needed.disk / GB:.1f} GB, {free_disk(request.repository) / GB:.1f} GB are free")
    _say(f"memory     {needed.memory / GB:.1f} GB")
    check_resources(needed, request.repository)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
