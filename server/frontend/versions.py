"""What a served model is made of: the state of a version, its folder and how a change of it is detected, what a load
request brings.
"""

import asyncio
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath

from server.backends.base import Model, ModelFolder
from server.errors import ConfigError, InvalidRequestError
from server.rpc.triton.model_config import read_model_file

log = logging.getLogger(__name__)

MAX_VERSION = 2**63 - 1
UNLOADED = "unloaded"  # the reason of a version that is no longer wanted


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
    model: Model | None = None  # from the start of its loading to the end of its unloading
    state: ModelState = ModelState.LOADING
    reason: str = ""
    loading: "asyncio.Task[None] | None" = None  # the task that loads it, kept after it has ended

    @property
    def accepting(self) -> Model | None:
        """The model, while it takes requests; they wait while it is not ready, as when its workers restart."""
        return self.model if self.state is ModelState.READY else None

    @property
    def wanted(self) -> bool:
        """Whether it is to be served."""
        return self.state is not ModelState.UNLOADING and self.reason != UNLOADED

    @property
    def ready(self) -> bool:
        """Whether it is served at this moment."""
        model = self.accepting
        return model is not None and model.ready

    @property
    def standing(self) -> str:
        """Why it takes no requests."""
        return self.reason or self.state.lower()

    def retire(self) -> None:
        """Accepts no more requests; those under way continue, but loading is cancelled."""
        if self.state is ModelState.UNAVAILABLE:
            return
        if self.state is ModelState.LOADING and self.loading is not None:
            self.loading.cancel()
        elif self.model is not None:
            try:
                self.model.retire()
            except Exception:  # the boundary between one backend and the server
                log.exception("a backend failed to retire %s", self.folder.file.name)
        self.state = ModelState.UNLOADING

    def rest(self, reason: str = UNLOADED) -> None:
        """Records that nothing of it is loaded any more, and why."""
        self.model, self.state, self.reason = None, ModelState.UNAVAILABLE, reason


@dataclass(frozen=True)
class IndexEntry:
    """A line of the repository's index; a model that could not even be read has no version."""

    name: str
    version: str
    state: ModelState | None
    reason: str


@dataclass(frozen=True)
class Override:
    """What a load request brings instead of the repository's files.

    Raises:
        InvalidRequestError: a file has no name, or would lie outside the model's folder.
    """

    config: str  # the text of a config.pbtxt; empty: all defaults
    files: dict[str, bytes] = field(default_factory=dict)  # by their path in the model's folder

    def __post_init__(self) -> None:
        for name in self.files:
            parts = PurePosixPath(name).parts
            if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
                raise InvalidRequestError.of("file", name, "a path inside the model's folder is, such as 1/model.onnx")

    def lay_out(self, model: Path, scratch: Path) -> Path:
        """Makes a folder in `scratch` like `model`, with this config and, if any, these files instead of the versions.

        Raises:
            ConfigError: it cannot be written.
        """
        shadow = scratch / model.name
        try:
            shadow.mkdir()
            for name, data in self.files.items():
                (shadow / name).parent.mkdir(parents=True, exist_ok=True)
                (shadow / name).write_bytes(data)
            for version in () if self.files else version_folders(model):
                (shadow / version.name).symlink_to(version.resolve())
            (shadow / "config.pbtxt").write_text(self.config, "utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"what the load request brings cannot be written: {error}") from error
        return shadow


def check_version(text: str) -> None:
    """Raises InvalidRequestError unless `text` is a version number."""
    if not re.fullmatch(r"-?[0-9]+", text) or len(text) > len(str(MAX_VERSION)):
        raise InvalidRequestError(
            f"failed to get model version from specified version string '{text[:32]}', "
            "version should be an integral value > 0"
        )
    if int(text) <= 0:
        raise InvalidRequestError(f"invalid model version specified '{text}' , version should be an integral value > 0")


def version_folders(model: Path) -> list[Path]:
    """The version folders of a model."""
    return [p for p in model.iterdir() if p.name.isdecimal() and p.is_dir()]


def chosen_folders(path: Path) -> list[ModelFolder]:
    """The versions in the folder that its version policy selects.

    Raises:
        ConfigError: there is none, or no readable config.
    """
    there = [p.name for p in version_folders(path)]
    if not there:
        raise ConfigError(f"{path} holds no version; finish its export with `zserve export --name {path.name}`")
    file = read_model_file(path)
    versions = file.versions.choose(there)
    if not versions:
        raise ConfigError("no version is available: its folder has none that the version policy asks for")
    return [ModelFolder(path, version, file) for version in versions]


def folder_mark(model: Path) -> object:
    """A value that changes whenever config.pbtxt or a file of a version does; empty if there is neither.

    Other files in the folder do not count: an export writes there for minutes, and its files come and go.
    """
    return sorted(mark for file in _files(model) for mark in _file_mark(file))


def _files(model: Path) -> Iterator[Path]:
    yield model / "config.pbtxt"
    try:
        versions = version_folders(model)
    except OSError:  # the model itself has gone since it was listed
        return
    for version in versions:
        for folder, _, names in os.walk(version):
            yield from (Path(folder, name) for name in names if not name.startswith("."))


def _file_mark(file: Path) -> list[tuple[str, int, int]]:
    try:
        found = file.stat()
    except OSError:  # it has gone since it was listed, or cannot be read, which a load will report
        return []
    return [(str(file), found.st_mtime_ns, found.st_size)]
