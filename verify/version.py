"""One version of a model, found by the path that the user gives."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from export.devices import current_target
from export.errors import ManifestError
from export.manifest import Manifest
from export.repository import versions
from server.config import FallbackPolicy, cpu_threads
from server.engines.eager import EagerModules
from server.engines.load import EngineLoader
from server.worker.executor import Components


@dataclass(frozen=True)
class Version:
    """A version's folder and manifest."""

    folder: Path
    manifest: Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `open_version` reads."""
    parser.add_argument("model", type=Path, help="the model's folder in the repository, such as models/z-image-demo")
    parser.add_argument("--version", type=int, help="default: the newest")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def open_version(arguments: argparse.Namespace) -> Version:
    """The version asked for.

    Raises:
        ManifestError: it is not there, or its manifest cannot be read.
    """
    model = arguments.model.resolve()  # `.` too: its name and its repository appear in printed commands
    numbers = versions(model)
    number = max(numbers, default=None) if arguments.version is None else arguments.version
    if number not in numbers:
        kind = "give a model's folder, such as models/z-image-demo; `zserve export` makes one"
        there = f"there are {numbers}" if numbers else kind
        raise ManifestError(f"{arguments.model} has no version {'at all' if number is None else number}: {there}")
    folder = model / str(number)
    return Version(folder, Manifest.read(folder))


def load_engines(folder: Path, manifest: Manifest, modules: EagerModules, policy: FallbackPolicy) -> Components:
    """The components of the version in `folder` as one worker alone loads them: eager where `manifest` has no engine.

    Raises:
        EngineLoadError: an engine cannot be used, and the policy refuses to fall back.
    """
    target = current_target(str(modules.device))
    return EngineLoader(folder, manifest, target, modules, cpu_threads(1), policy).load_all()
