"""One version of a model in the repository: its state, and what tells it from another."""

import shutil
import tempfile
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from server.backends.base import Model, ModelFolder
from server.errors import ConfigError, InvalidRequestError

MAX_VERSION = 2**63 - 1
UNLOADED = "unloaded"  # the reason of a version that was there and is not wanted now


class ModelState(StrEnum):
    """Triton's states of a version."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(eq=False)
class Version:
    """One version of a model as it stands now."""

    folder: ModelFolder
    model: Model | None = None  # while it is loaded
    state: ModelState = ModelState.LOADING
    reason: str = ""


@dataclass(frozen=True)
class IndexEntry:
    """A line of the repository's index; a model that could not even be read has no version."""

    name: str
    version: str
    state: ModelState | None
    reason: str


@dataclass(frozen=True)
class Override:
    """What a load request brings instead of the repository's files."""

    config: str = ""  # the text of a config.pbtxt
    files: dict[str, bytes] = field(default_factory=dict)  # by their path in the model's folder

    def lay_out(self, model: Path, scratch: Path) -> Path:
        """A folder below `scratch` like `model`, with this config, and with these files instead of the versions.

        Raises:
            ConfigError: a file would lie outside the folder.
        """
        shadow = Path(tempfile.mkdtemp(dir=scratch)) / model.name
        shadow.mkdir()
        for name, data in self.files.items():
            target = (shadow / name).resolve()
            if not target.is_relative_to(shadow.resolve()):
                raise ConfigError(f"file:{name} lies outside the model's folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        for entry in () if self.files else model.iterdir():
            if entry.is_dir():
                (shadow / entry.name).symlink_to(entry.resolve())
        if self.config:
            (shadow / "config.pbtxt").write_text(self.config, "utf-8")
        else:
            shutil.copy(model / "config.pbtxt", shadow / "config.pbtxt")
        return shadow


def check_version(text: str) -> None:
    """Raises InvalidRequestError unless `text` is a version's number."""
    if not text.lstrip("-").isdecimal() or len(text) > len(str(MAX_VERSION)):
        raise InvalidRequestError(
            f"failed to get model version from specified version string '{text[:32]}', "
            "version should be an integral value > 0"
        )
    if int(text) <= 0:
        raise InvalidRequestError(f"invalid model version specified '{text}' , version should be an integral value > 0")


def folder_mark(folder: Path) -> object:
    """Differs whenever a file of the model has changed."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in files)
