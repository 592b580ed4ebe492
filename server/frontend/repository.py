"""The model repository: which models and versions there are, and those that are loaded.

A new version is loaded before the one it replaces goes, and a model that cannot be loaded leaves everything else as it
was: its name and the reason are in the index.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from server.backends.base import Backend, Host, Model, ModelFile, ModelFolder
from server.backends.registry import find_backend
from server.errors import (
    ConfigError,
    EngineLoadError,
    ModelNotFoundError,
    ModelNotReadyError,
    ZServeError,
)
from server.frontend.versions import (
    UNLOADED,
    IndexEntry,
    ModelState,
    Override,
    Version,
    check_version,
    folder_mark,
)
from server.rpc.triton.model_config import read_model_file

log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0  # that requests of a replaced or unloaded version get to finish


class Repository:
    """The models under `path`."""

    def __init__(self, path: Path, host: Host, backends: Callable[[str], Backend] = find_backend) -> None:
        self._path, self._host, self._backends = path, host, backends
        self._versions: dict[str, dict[str, Version]] = {}
        self._broken: dict[str, str] = {}
        self._marks: dict[str, object] = {}  # what each loaded folder looked like
        self._locks: dict[str, asyncio.Lock] = {}
        self._unloading: set[asyncio.Task[None]] = set()

    def find(self, name: str, version: str = "") -> Model:
        """The model that serves `version`, or the newest one that is ready.

        Raises:
            InvalidRequestError: `version` is not one.
            ModelNotFoundError: there is no such model or version.
            ModelNotReadyError: the version is there, but does not serve.
        """
        versions = self._versions.get(name)
        if not versions:
            raise ModelNotFoundError(self._unknown(name))
        if not version:
            return self._newest(name, versions)
        check_version(version)
        if version not in versions:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' version {version} is not found")
        found = versions[version]
        if found.model is None or found.state is not ModelState.READY or not found.model.ready:
            raise ModelNotReadyError(
                f"Request for unknown model: '{name}' version {version} is not at ready state ({found.reason})"
            )
        return found.model

    def file(self, model: Model) -> ModelFile:
        """The config that `model` was loaded with."""
        return self._versions[model.spec.name][model.spec.version].folder.file

    def loaded(self, name: str = "") -> list[Model]:
        """The models that serve, by name and version; all of them, or those called `name`."""
        found = [v.model for v in self._each(name) if v.model is not None and v.state is ModelState.READY]
        return sorted(found, key=lambda m: (m.spec.name, int(m.spec.version)))

    def index(self) -> list[IndexEntry]:
        """Every model of the repository, loaded or not."""
        entries = [IndexEntry(v.folder.file.name, v.folder.version, v.state, v.reason) for v in self._each()]
        unread = {name: IndexEntry(name, "", ModelState.UNAVAILABLE, why) for name, why in self._broken.items()}
        known = {e.name for e in entries}
        others = [IndexEntry(p.name, "", None, "") for p in self._folders() if p.name not in known | set(unread)]
        return sorted([*entries, *unread.values(), *others], key=lambda e: (e.name, int(e.version or 0)))

    @property
    def ready(self) -> bool:
        """Whether all that is to be served is."""
        return not self._broken and all(
            v.state is ModelState.READY and v.model is not None and v.model.ready
            for v in self._each()
            if v.state is not ModelState.UNLOADING and v.reason != UNLOADED
        )

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
        """Loads what the version policy asks for and is not loaded as it is; then drops what that replaces.

        Raises:
            EngineLoadError: it cannot be loaded; what served before still does.
        """
        async with self._locks.setdefault(name, asyncio.Lock()):
            try:
                await self._load(name, override)
            except ZServeError as error:
                log.error("cannot load model %s: %s", name, error)
                if name not in self._versions:
                    self._broken[name] = str(error)
                raise EngineLoadError(f"failed to load '{name}', {error}") from error
            finally:
                self._host.changed()

    def unload_soon(self, name: str) -> None:
        """Begins to unload `name`, and takes no more requests for it.

        Raises:
            ModelNotFoundError: it is not loaded.
        """
        versions = [v for v in self._each(name) if v.model is not None] if name else []
        if not versions:
            raise ModelNotFoundError(self._unknown(name))
        for version in versions:
            version.state = ModelState.UNLOADING
        task = asyncio.create_task(self.unload(name))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def unload(self, name: str) -> None:
        """Stops serving `name`; requests under way may finish.

        Raises:
            ModelNotFoundError: it is not loaded.
        """
        async with self._locks.setdefault(name, asyncio.Lock()):
            versions = list(self._versions.get(name, {}).values())
            if not versions:
                self._broken.pop(name, None)
                raise ModelNotFoundError(self._unknown(name))
            self._marks.pop(name, None)
            await asyncio.gather(*(self._drop(v) for v in versions))

    async def poll(self) -> None:
        """Brings what is loaded into line with the folders: new, changed and removed ones.

        Raises:
            ConfigError: the repository itself is gone.
        """
        present = set(self.names())
        marks = await asyncio.to_thread(lambda: {name: folder_mark(self._path / name) for name in present})
        changed = [name for name in present if self._marks.get(name) != marks[name]]
        gone = [name for name in self._versions if name not in present and self._each(name)]
        await asyncio.gather(*(self.load(name) for name in changed), return_exceptions=True)
        await asyncio.gather(*(self.unload(name) for name in gone), return_exceptions=True)
        for name in {*gone, *(self._broken.keys() - present)}:
            self._versions.pop(name, None)
            self._broken.pop(name, None)

    async def close(self) -> None:
        """Unloads everything at once."""
        await asyncio.gather(*(v.model.unload() for v in self._each() if v.model is not None))

    async def _load(self, name: str, override: Override | None) -> None:
        path = self._path / name
        if Path(name).name != name or not path.is_dir():
            raise ConfigError("failed to poll from model repository: it has no folder of that name")
        mark = folder_mark(path)
        if override is None and self._marks.get(name) == mark and self.loaded(name):
            return
        self._marks[name] = mark  # also of one that fails: polling is to try again only when it has changed
        if override is not None:
            path = override.lay_out(path, self._host.sockets)
        there = [p.name for p in path.iterdir() if p.is_dir() and p.name.isdecimal()]
        if not there:
            raise ConfigError(f"{path} holds no version; finish its export with `zserve export --name {name}`")
        file = read_model_file(path)
        versions = file.versions.choose(there)
        if not versions:
            raise ConfigError("no version is available: its folder has none that the version policy asks for")
        self._broken.pop(name, None)
        folders = [ModelFolder(path, version, file) for version in versions]
        await self._replace(name, folders)

    async def _replace(self, name: str, folders: list[ModelFolder]) -> None:
        """Loads `folders`, and only then drops the versions that were there before."""
        served = self._versions.setdefault(name, {})
        fresh = [Version(folder) for folder in folders]
        for version in fresh:
            served.setdefault(version.folder.version, version)
        failures = [e for e in await asyncio.gather(*(self._start(v) for v in fresh)) if e]
        wanted = {v.folder.version for v in fresh if v.model is not None}
        old = [v for v in served.values() if v not in fresh and (v.folder.version in wanted or not failures)]
        served.update({v.folder.version: v for v in fresh if v.model is not None})
        await asyncio.gather(*(self._drop(v) for v in old))
        for version in [v for v in old if v.folder.version not in wanted]:
            version.reason = UNLOADED
        if failures:
            raise ConfigError("; ".join(failures))

    async def _start(self, version: Version) -> str:
        """Loads one version; returns why it could not be."""
        began = time.monotonic()
        folder = version.folder
        try:
            model = self._backends(folder.file.backend)(folder, self._host)
            await model.load()
        except ZServeError as error:
            version.state, version.reason = ModelState.UNAVAILABLE, str(error)
            return f"version {folder.version}: {error}"
        except Exception as error:
            log.exception("backend %s failed to load %s", folder.file.backend, folder.file.name)
            version.state, version.reason = ModelState.UNAVAILABLE, f"{type(error).__name__}: {error}"
            return f"version {folder.version}: {version.reason}"
        model.statistics.load_seconds = time.monotonic() - began
        version.model, version.state, version.reason = model, ModelState.READY, ""
        log.info("model %s version %s is ready", folder.file.name, folder.version)
        return ""

    async def _drop(self, version: Version) -> None:
        model = version.model
        if model is None:
            return
        version.state = ModelState.UNLOADING
        try:
            await asyncio.wait_for(model.statistics.idle(), DRAIN_SECONDS)
        except TimeoutError:
            log.warning("model %s is unloaded with requests under way", model.spec.name)
        await model.unload()
        version.model, version.state, version.reason = None, ModelState.UNAVAILABLE, UNLOADED
        self._host.changed()

    def _newest(self, name: str, versions: dict[str, Version]) -> Model:
        newest: Model | None = None
        for version in versions.values():
            model = version.model
            serves = model is not None and version.state is ModelState.READY and model.ready
            if serves and (newest is None or int(version.folder.version) > int(newest.spec.version)):
                newest = model
        if newest is None:
            reasons = "; ".join(v.reason or v.state.lower() for v in versions.values())
            if all(v.state is ModelState.UNAVAILABLE for v in versions.values()):
                raise ModelNotFoundError(f"Request for unknown model: '{name}' has no available versions ({reasons})")
            raise ModelNotReadyError(f"Request for unknown model: '{name}' is not at ready state ({reasons})")
        return newest

    def _unknown(self, name: str) -> str:
        known = ", ".join(sorted(self._versions)) or "none"
        reason = self._broken.get(name)
        because = f": {reason}" if reason else f"; there are: {known}"
        return f"Request for unknown model: '{name}' is not found{because}"

    def _each(self, name: str = "") -> list[Version]:
        groups: Iterable[dict[str, Version]] = [self._versions.get(name, {})] if name else self._versions.values()
        return [version for group in groups for version in group.values()]

    def _folders(self) -> list[Path]:
        if not self._path.is_dir():
            return []
        return sorted(p for p in self._path.iterdir() if p.is_dir() and not p.name.startswith("."))
