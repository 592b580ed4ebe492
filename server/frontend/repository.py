"""The model repository: which models and versions exist, and which are loaded.

A new version is loaded before the one it replaces is dropped, and a model that cannot be loaded leaves everything else
as it was: its name and the reason are in the index.
"""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from server.backends.base import Backend, Host, Model, ModelFile, ModelFolder
from server.backends.registry import find_backend
from server.errors import (
    ConfigError,
    EngineLoadError,
    ModelNotFoundError,
    ModelNotReadyError,
    OvertakenError,
    ShuttingDownError,
    ZServeError,
)
from server.frontend.versions import (
    UNLOADED,
    Entry,
    IndexEntry,
    ModelState,
    Override,
    Version,
    check_version,
    chosen_folders,
    folder_mark,
)

log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0  # for requests of a replaced or unloaded version to finish


class Repository:
    """The models under `path`."""

    def __init__(self, path: Path, host: Host, backends: Callable[[str], Backend] = find_backend) -> None:
        self._path, self._host, self._backends = path, host, backends
        self._entries: dict[str, Entry] = {}  # by name; only for folders that exist or have existed
        self._live: set[Version] = set()  # those with a model, including replaced ones not yet unloaded
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
        entry = self._entries.get(name)
        if entry is None or not entry.versions:
            raise ModelNotFoundError(self._unknown(name))
        if not version:
            return entry.newest(name)
        check_version(version)
        if version not in entry.versions:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' version {version} is not found")
        found = entry.versions[version]
        if found.accepting is None:
            raise ModelNotReadyError(
                f"Request for unknown model: '{name}' version {version} is not at ready state ({found.standing})"
            )
        return found.accepting

    def file(self, model: Model) -> ModelFile:
        """The config that `model` was loaded with."""
        return self._entries[model.spec.name].versions[model.spec.version].folder.file

    def loaded(self, name: str = "") -> list[Model]:
        """The models that take requests, by name and version: all, or those called `name`. Safe from any thread."""
        found = [model for v in self._each(name) if (model := v.accepting) is not None]
        return sorted(found, key=lambda m: (m.spec.name, int(m.spec.version)))

    @property
    def live(self) -> list[Model]:
        """The models that may have requests: those that serve, and those being loaded or unloaded."""
        return [v.model for v in self._live if v.model is not None]

    def index(self) -> list[IndexEntry]:
        """Every model of the repository, loaded or not."""
        names = {p.name for p in self._folders()} | {n for n, e in self._entries.items() if e.versions or e.error}
        lines = [line for name in names for line in self._entries.get(name, Entry()).index(name)]
        return sorted(lines, key=lambda e: (e.name, int(e.version or 0)))

    def readiness(self) -> dict[str, bool]:
        """For each model that is to be served, whether all of its wanted versions are; safe from any thread."""
        states = {name: entry.ready for name, entry in list(self._entries.items())}
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
            await self._own(self._load_in_turn(name, self._entries.setdefault(name, Entry()), override))
        except asyncio.CancelledError:
            if self._closing:
                raise ending from None
            raise

    def unload_soon(self, name: str) -> None:
        """Starts to unload `name`, and accepts no more requests for it; requests under way may finish.

        Loads of it under way are abandoned. As in Triton, a model that is not loaded or does not exist is no error.
        """
        entry = self._entries.get(name)
        if entry is not None:
            self._begin_unload(entry)

    async def poll(self) -> None:
        """Brings what is loaded into line with the folders: new, changed and removed ones.

        Raises:
            ConfigError: the repository itself is gone.
        """
        present = set(self.names())
        marks = await asyncio.to_thread(lambda: {name: folder_mark(self._path / name) for name in present})
        # A folder with nothing to load yet is one where an export has just begun.
        known = {name: self._entries[name].tried_mark if name in self._entries else [] for name in present}
        changed = [name for name in present if known[name] != marks[name]]
        gone = self._entries.keys() - present
        loads = await asyncio.gather(*(self.load(name) for name in changed), return_exceptions=True)
        drops = await asyncio.gather(
            *(self._begin_unload(self._entries[name]) for name in gone), return_exceptions=True
        )
        for name in gone:
            del self._entries[name]
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
        await asyncio.gather(*(_unload(model) for model in self.live))

    def _own(self, work: Coroutine[Any, Any, None]) -> "asyncio.Future[None]":
        """Runs `work` to its end, even if nobody waits for it any more; only `close` stops it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_is_known)
        return asyncio.shield(task)

    async def _load_in_turn(self, name: str, entry: Entry, override: Override | None) -> None:
        async with entry.lock:
            try:
                await self._load(self._path / name, entry, override)
            except (ZServeError, OSError) as error:
                if entry.unloads:
                    raise OvertakenError(f"'{name}' was unloaded before it was loaded") from error
                log.error("cannot load model %s: %s", name, error)
                if not entry.active:
                    entry.error = str(error)
                raise EngineLoadError(f"failed to load '{name}', {error}") from error
            finally:
                await self._tidy(entry)
                self._host.changed()

    async def _load(self, path: Path, entry: Entry, override: Override | None) -> None:
        mark = await asyncio.to_thread(folder_mark, path)
        if override is None and entry.loaded_mark == mark:
            return
        entry.loaded_mark, entry.tried_mark = None, mark
        if override is None:
            await self._replace(entry, chosen_folders(path))
            entry.loaded_mark = mark
            return
        scratch = Path(tempfile.mkdtemp(dir=self._host.sockets))
        entry.scratch.add(scratch)
        await self._replace(entry, chosen_folders(await asyncio.to_thread(override.lay_out, path, scratch)))

    async def _replace(self, entry: Entry, folders: list[ModelFolder]) -> None:
        """Loads `folders`, and only then drops the versions that were there before."""
        if entry.unloads:
            raise ConfigError("it is to be unloaded")
        entry.error = ""
        entry.fresh = fresh = [Version(folder) for folder in folders]
        served = entry.versions
        for version in fresh:
            served.setdefault(version.folder.version, version)
        async with asyncio.TaskGroup() as group:
            for version in fresh:
                version.loading = group.create_task(self._start(version))
        failures = [f"version {v.folder.version}: {v.standing}" for v in fresh if v.model is None]
        loaded = {v.folder.version: v for v in fresh if v.model is not None}
        old = [v for v in served.values() if v not in fresh and (v.folder.version in loaded or not failures)]
        served.update(loaded)
        await _together(self._drop(v) for v in old)
        if failures:
            raise ConfigError("; ".join(failures))

    async def _start(self, version: Version) -> None:
        """Loads one version; if that fails, its reason says why."""
        began = time.monotonic()
        folder = version.folder
        try:
            version.model = model = self._backends(folder.file.backend)(folder, self._host)
            self._live.add(version)
            await model.load()
            model.statistics.load_seconds = time.monotonic() - began
        except asyncio.CancelledError:  # it is unloaded, or the server shuts down
            await self._abandon(version)
            raise
        except ZServeError as error:
            await self._abandon(version, str(error))
            return
        except Exception as error:
            log.exception("backend %s failed to load %s", folder.file.backend, folder.file.name)
            await self._abandon(version, f"{type(error).__name__}: {error}")
            return
        version.state = ModelState.READY
        self._host.changed()  # now: what it replaces may take long to unload
        log.info("model %s version %s is ready", folder.file.name, folder.version)

    async def _abandon(self, version: Version, reason: str = UNLOADED) -> None:
        """Frees what a failed or cancelled load has begun; finishes even if it is cancelled meanwhile."""
        model = version.model
        try:
            if model is not None:
                await _unload(model)
        except asyncio.CancelledError:
            if model is not None:
                await _unload(model)
            raise
        finally:
            self._rest(version, reason)

    def _begin_unload(self, entry: Entry) -> "asyncio.Future[None]":
        entry.unloads += 1
        entry.retire()
        return self._own(self._unload(entry))

    async def _unload(self, entry: Entry) -> None:
        async with entry.lock:  # first come, first served: loads requested earlier have ended
            entry.unloads -= 1
            entry.error, entry.loaded_mark = "", None
            await _together(self._drop(v) for v in entry.versions.values())
            await self._tidy(entry)
            self._host.changed()

    async def _drop(self, version: Version) -> None:
        model = version.model
        if model is not None:
            version.retire()
            try:
                await asyncio.wait_for(model.statistics.idle(), DRAIN_SECONDS)
            except TimeoutError:
                log.warning("model %s is unloaded with requests under way", model.spec.name)
            await _unload(model)
        self._rest(version)
        self._host.changed()

    def _rest(self, version: Version, reason: str = UNLOADED) -> None:
        version.rest(reason)
        self._live.discard(version)

    async def _tidy(self, entry: Entry) -> None:
        """Removes files of load requests that no live version uses; until then a replaced worker may reread them."""
        unused = entry.scratch - {v.folder.path.parent for v in self._live}
        entry.scratch -= unused
        for scratch in unused:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)

    def _unknown(self, name: str) -> str:
        known = ", ".join(sorted(n for n, e in self._entries.items() if e.versions)) or "none"
        reason = self._entries.get(name, Entry()).error
        because = f": {reason}" if reason else f"; there are: {known}"
        return f"Request for unknown model: '{name}' is not found{because}"

    def _each(self, name: str = "") -> list[Version]:
        entries: Iterable[Entry] = [self._entries.get(name, Entry())] if name else self._entries.values()
        return [version for entry in list(entries) for version in list(entry.versions.values())]

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


async def _unload(model: Model) -> None:
    """Unloads `model`; an error of its backend is only logged, so that nothing else is affected."""
    try:
        await model.unload()
    except Exception:
        log.exception("a backend failed to unload %s", model.spec.name)


async def _together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Runs all of `works` concurrently, and returns only when all of them have ended, even if cancelled."""
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(work)
