"""The model repository: which models exist, and which are loaded.

A model that cannot be loaded leaves everything else as it was: its name and the reason are in the index.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from server.backends.base import Backend, Host, Model, ModelFile
from server.backends.registry import find_backend
from server.errors import (
    ConfigError,
    EngineLoadError,
    ModelNotFoundError,
    ShuttingDownError,
    ZServeError,
)
from server.frontend.served_model import ServedModel, unload
from server.frontend.versions import IndexEntry, Override, Version, folder_mark

log = logging.getLogger(__name__)


class Repository:
    """The models under `path`."""

    def __init__(self, path: Path, host: Host, backends: Callable[[str], Backend] = find_backend) -> None:
        self._path, self._host, self._backends = path, host, backends
        self._models: dict[str, ServedModel] = {}  # by name; only for folders that exist or have existed
        self._tasks: set[asyncio.Task[None]] = set()
        self._left_out: set[str] = set()  # folders already logged as left out
        self._closing = False

    def find(self, name: str, version: str = "") -> Model:
        """The model that takes requests for `version`, or for the newest one that is ready.

        Raises:
            InvalidRequestError: `version` is not a version number.
            ModelNotFoundError: there is no such model or version.
            ModelNotReadyError: the version is there, but takes no requests.
        """
        model = self._models.get(name)
        if model is None or not model.versions:
            raise ModelNotFoundError(self._unknown(name))
        return model.find(version)

    def file(self, model: Model) -> ModelFile:
        """The config that `model` was loaded with."""
        return self._models[model.spec.name].versions[model.spec.version].folder.file

    def loaded(self, name: str = "") -> list[Model]:
        """The models that take requests, by name and version: all, or those called `name`. Safe from any thread."""
        found = [model for v in self._each(name) if (model := v.accepting) is not None]
        return sorted(found, key=lambda m: (m.spec.name, int(m.spec.version)))

    @property
    def live(self) -> list[Model]:
        """The models that may have requests: those that serve, and those being loaded or unloaded."""
        return [version for model in self._models.values() for version in model.live]

    def index(self) -> list[IndexEntry]:
        """Every model of the repository, loaded or not."""
        known = [model for model in self._models.values() if model.versions or model.error]
        lines = [line for model in known for line in model.index]
        others = {p.name for p in self._folders()} - {model.name for model in known}
        lines += [IndexEntry(name, "", None, "") for name in others]
        return sorted(lines, key=lambda e: (e.name, int(e.version or 0)))

    def readiness(self) -> dict[str, bool]:
        """For each model that is to be served, whether all of its wanted versions are; safe from any thread."""
        states = {name: model.ready for name, model in list(self._models.items())}
        return {name: ready for name, ready in states.items() if ready is not None}

    def names(self) -> list[str]:
        """The models that have a folder, by name.

        Raises:
            ConfigError: there is no repository.
        """
        if not self._path.is_dir():
            raise ConfigError(
                f"no model repository at {self._path}; make one with `zserve export --repository {self._path}`"
            )
        return [p.name for p in self._folders()]

    async def load(self, name: str, override: Override | None = None) -> None:
        """Loads the versions that the version policy selects, unless unchanged; then drops what they replace.

        It continues if the caller goes away: half a load is of no use to anybody.

        Raises:
            ModelNotFoundError: it has no folder.
            EngineLoadError: it cannot be loaded; what served before still does.
            OvertakenError: it is unloaded before it is loaded.
            ShuttingDownError: the server ends before it is loaded.
        """
        try:
            present = [p.name for p in self._folders()]
        except OSError as error:  # no file descriptor is left, for example
            raise EngineLoadError(f"failed to load '{name}', {error}") from error
        if name not in present:
            known = ", ".join(present) or "none"
            raise ModelNotFoundError(
                f"failed to load '{name}', failed to poll from model repository: it has no folder of that name; "
                f"there are: {known}"
            )
        ending = ShuttingDownError(f"the server shuts down and does not load '{name}'")
        if self._closing:
            raise ending
        try:
            if name not in self._models:
                self._models[name] = ServedModel(name, self._path / name, self._host, self._backends)
            await self._own(self._models[name].load(override))
        except asyncio.CancelledError:
            if self._closing:
                raise ending from None
            raise

    def unload_soon(self, name: str) -> None:
        """Starts to unload `name`, and accepts no more requests for it; requests under way may finish.

        Loads of it under way are abandoned. As in Triton, a model that is not loaded or does not exist is no error.
        """
        model = self._models.get(name)
        if model is not None:
            self._own(model.unload())

    async def poll(self) -> None:
        """Brings what is loaded into line with the folders: new, changed and removed ones.

        Raises:
            ConfigError: the repository itself is gone.
        """
        present = set(self.names())
        marks = await asyncio.to_thread(lambda: {name: folder_mark(self._path / name) for name in present})
        # A folder with nothing to load yet is one where an export has just begun.
        known = {name: self._models[name].tried_mark if name in self._models else [] for name in present}
        changed = [name for name in present if known[name] != marks[name]]
        gone = self._models.keys() - present
        loads = await asyncio.gather(*(self.load(name) for name in changed), return_exceptions=True)
        drops = await asyncio.gather(*(self._own(self._models[n].unload()) for n in gone), return_exceptions=True)
        for name in gone:
            del self._models[name]
        for error in (*loads, *drops):
            if isinstance(error, BaseException) and not isinstance(error, ZServeError):  # those have been logged
                raise error

    async def close(self) -> None:
        """Unloads everything at once, including what is being loaded."""
        self._closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(unload(model) for model in self.live))

    def _own(self, work: Coroutine[Any, Any, None]) -> "asyncio.Future[None]":
        """Runs `work` to its end, even if nobody waits for it any more; only `close` stops it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_is_known)
        return asyncio.shield(task)

    def _unknown(self, name: str) -> str:
        known = ", ".join(sorted(n for n, m in self._models.items() if m.versions)) or "none"
        reason = self._models[name].error if name in self._models else ""
        because = f": {reason}" if reason else f"; there are: {known}"
        return f"Request for unknown model: '{name}' is not found{because}"

    def _each(self, name: str = "") -> list[Version]:
        models = [m for m in list(self._models.values()) if name in ("", m.name)]
        return [version for model in models for version in list(model.versions.values())]

    def _folders(self) -> list[Path]:
        if not self._path.is_dir():
            return []
        return sorted(
            p for p in self._path.iterdir() if p.is_dir() and not p.name.startswith(".") and self._can_be_named(p.name)
        )

    def _can_be_named(self, folder: str) -> bool:
        """Whether the protocol can carry the name; if not, that is logged, once."""
        named = _is_unicode(folder)
        if not named and folder not in self._left_out:
            self._left_out.add(folder)
            log.warning("the folder %a is left out: its name is not UTF-8", folder)
        return named


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_known(task: "asyncio.Task[None]") -> None:
    """Retrieves the task's error, so that asyncio does not report it: it is logged, and the caller may be gone."""
    if not task.cancelled():
        task.exception()
