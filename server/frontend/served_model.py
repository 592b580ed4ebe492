"""One model of the repository: its versions are loaded, replaced and unloaded here.

A new version is loaded before the one it replaces is dropped.
"""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from server.backends.base import Backend, Host, Model, ModelFolder
from server.errors import (
    ConfigError,
    EngineLoadError,
    ModelNotFoundError,
    ModelNotReadyError,
    OvertakenError,
    ZServeError,
)
from server.frontend.versions import (
    UNLOADED,
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


class ServedModel:
    """The model called `name` in the folder `path`, from the first request to load it."""

    def __init__(self, name: str, path: Path, host: Host, backends: Callable[[str], Backend]) -> None:
        self.name = name
        self.versions: dict[str, Version] = {}
        self.error = ""  # why its folder cannot be read
        self.tried_mark: object = None  # of the folder at the last attempt: polling retries only when it has changed
        self._path, self._host, self._backends = path, host, backends
        self._loaded_mark: object = None  # of the folder as loaded; None after anything but a successful load of it
        self._fresh: list[Version] = []  # versions that the last load has started
        self._live: set[Version] = set()  # those with a model, including replaced ones not yet unloaded
        self._unloads = 0  # requested and not done yet; loads requested before them are abandoned
        self._scratch: set[Path] = set()  # folders with the files of load requests
        self._lock = asyncio.Lock()  # held while loading or unloading

    @property
    def ready(self) -> bool | None:
        """Whether every wanted version is ready; None if there is nothing to serve. Safe from any thread."""
        wanted = [v for v in list(self.versions.values()) if v.wanted]
        if not wanted and not self.error:
            return None
        return not self.error and all(v.ready for v in wanted)

    @property
    def live(self) -> list[Model]:
        """What may have requests: what serves, and what is being loaded or unloaded."""
        return [v.model for v in self._live if v.model is not None]

    @property
    def index(self) -> list[IndexEntry]:
        """Its lines in the repository's index."""
        lines = [IndexEntry(self.name, v.folder.version, v.state, v.reason) for v in self.versions.values()]
        if self.error:
            lines.append(IndexEntry(self.name, "", ModelState.UNAVAILABLE, self.error))
        return lines

    def find(self, version: str) -> Model:
        """The model that takes requests for `version`; for an empty one, see `_newest`.

        Raises:
            InvalidRequestError: `version` is not a version number.
            ModelNotFoundError: there is no such version.
            ModelNotReadyError: the version is there, but takes no requests.
        """
        if not version:
            return self._newest()
        check_version(version)
        if version not in self.versions:
            raise ModelNotFoundError(f"Request for unknown model: '{self.name}' version {version} is not found")
        found = self.versions[version]
        if found.accepting is None:
            raise ModelNotReadyError(
                f"Request for unknown model: '{self.name}' version {version} is not at ready state ({found.standing})"
            )
        return found.accepting

    async def load(self, override: Override | None) -> None:
        """Loads the versions that the version policy selects, unless unchanged; then drops what they replace.

        Raises:
            EngineLoadError: it cannot be loaded; what served before still does.
            OvertakenError: it is unloaded before it is loaded.
        """
        async with self._lock:
            try:
                await self._load(override)
            except (ZServeError, OSError) as error:
                if self._unloads:
                    raise OvertakenError(f"'{self.name}' was unloaded before it was loaded") from error
                log.error("cannot load model %s: %s", self.name, error)
                if not any(v.model is not None or v.wanted for v in self.versions.values()):
                    self.error = str(error)
                raise EngineLoadError(f"failed to load '{self.name}', {error}") from error
            finally:
                await self._tidy()
                self._host.changed()

    def unload(self) -> Coroutine[Any, Any, None]:
        """Accepts no more requests from now on, and abandons loads; the rest is done when the result is awaited."""
        self._unloads += 1
        for version in {*self.versions.values(), *self._fresh}:
            version.retire()
        return self._unload()

    def _newest(self) -> Model:
        """The newest version that is ready; if none is at this moment, the newest that takes requests.

        Raises:
            ModelNotFoundError: none is loaded.
            ModelNotReadyError: none takes requests.
        """
        accepting = {int(number): model for number, v in self.versions.items() if (model := v.accepting) is not None}
        if accepting:
            ready = [number for number, model in accepting.items() if model.ready]
            return accepting[max(ready or accepting)]
        reasons = "; ".join(v.standing for v in self.versions.values())
        if all(v.state is ModelState.UNAVAILABLE for v in self.versions.values()):
            raise ModelNotFoundError(f"Request for unknown model: '{self.name}' has no available versions ({reasons})")
        raise ModelNotReadyError(f"Request for unknown model: '{self.name}' is not at ready state ({reasons})")

    async def _load(self, override: Override | None) -> None:
        mark = await asyncio.to_thread(folder_mark, self._path)
        if override is None and self._loaded_mark == mark:
            return
        self._loaded_mark, self.tried_mark = None, mark
        if override is None:
            await self._replace(chosen_folders(self._path))
            self._loaded_mark = mark
            return
        scratch = Path(tempfile.mkdtemp(dir=self._host.sockets))
        self._scratch.add(scratch)
        await self._replace(chosen_folders(await asyncio.to_thread(override.lay_out, self._path, scratch)))

    async def _replace(self, folders: list[ModelFolder]) -> None:
        """Loads `folders`, and only then drops the versions that were there before."""
        if self._unloads:
            raise ConfigError("it is to be unloaded")
        self.error = ""
        self._fresh = fresh = [Version(folder) for folder in folders]
        for version in fresh:  # shown at once, unless one of the same number still serves
            number = version.folder.version
            if number not in self.versions or self.versions[number].state is ModelState.UNAVAILABLE:
                self.versions[number] = version
        async with asyncio.TaskGroup() as group:
            for version in fresh:
                version.loading = group.create_task(self._start(version))
        failures = [f"version {v.folder.version}: {v.standing}" for v in fresh if v.model is None]
        loaded = {v.folder.version: v for v in fresh if v.model is not None}
        old = [v for v in self.versions.values() if v not in fresh and (v.folder.version in loaded or not failures)]
        self.versions.update(loaded)
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
                await unload(model)
        except asyncio.CancelledError:
            if model is not None:
                await unload(model)
            raise
        finally:
            self._rest(version, reason)

    async def _unload(self) -> None:
        async with self._lock:  # first come, first served: loads requested earlier have ended
            self._unloads -= 1
            self.error, self._loaded_mark = "", None
            await _together(self._drop(v) for v in self.versions.values())
            await self._tidy()
            self._host.changed()

    async def _drop(self, version: Version) -> None:
        model = version.model
        if model is not None:
            version.retire()
            try:
                await asyncio.wait_for(model.statistics.idle(), DRAIN_SECONDS)
            except TimeoutError:
                log.warning("model %s is unloaded with requests under way", model.spec.name)
            await unload(model)
        self._rest(version)

    def _rest(self, version: Version, reason: str = UNLOADED) -> None:
        version.rest(reason)
        self._live.discard(version)

    async def _tidy(self) -> None:
        """Removes files of load requests that no live version uses; until then a replaced worker may reread them."""
        unused = self._scratch - {v.folder.path.parent for v in self._live}
        self._scratch -= unused
        for scratch in unused:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)


async def unload(model: Model) -> None:
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
