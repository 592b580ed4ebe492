"""Downloads and lists checkpoints through the hubs' own libraries."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol


class Hub(StrEnum):
    """The kinds of source."""

    LOCAL = "local"
    HUGGINGFACE = "huggingface"
    MODELSCOPE = "modelscope"


@dataclass(frozen=True)
class RemoteFile:
    """A file that a hub has."""

    name: str  # its path in the repository
    size: int  # bytes
    here: int  # how many of them are in the cache, for the download to go on from

    @property
    def missing_bytes(self) -> int:
        """How much of it would be downloaded."""
        return self.size - self.here


@dataclass(frozen=True)
class Listing:
    """The files of a checkpoint on a hub, and the folder that they are downloaded into."""

    cache: Path
    files: tuple[RemoteFile, ...]

    @property
    def incomplete(self) -> tuple[RemoteFile, ...]:
        """The files that are not in the cache in full."""
        return tuple(f for f in self.files if f.missing_bytes)

    @property
    def missing_bytes(self) -> int:
        """How much would be downloaded."""
        return sum(f.missing_bytes for f in self.files)

    def weight_bytes(self, single: str) -> int:
        """The size of weights as stored in the file `single`, or in several; not of copies in another type."""
        several = f"{single.removesuffix('.safetensors')}-*-of-*.safetensors"
        return sum(f.size for f in self.files if f.name == single or fnmatch(f.name, several))


class Library(Protocol):
    """One hub's Python library, asked for the files of one checkpoint. Its calls raise `errors`."""

    errors: tuple[type[Exception], ...]

    def download(self, *, offline: bool) -> str:
        """The folder with the checkpoint's files, downloaded if missing, unless `offline`."""

    def list_files(self) -> Listing:
        """What `download` would get."""

    def cache(self) -> Path:
        """The cache that it downloads into."""


class HuggingFace:
    """`huggingface_hub`."""

    def __init__(self, name: str, revision: str | None, cache: Path | None, patterns: Sequence[str]) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        self._name, self._revision, self._cache, self._patterns = name, revision, cache, list(patterns)
        # Its first base is the HTTP library's own error, of a connection that breaks or a proxy that refuses; which
        # library that is depends on the release. The hub's Rust part, hf_xet, raises RuntimeError.
        self.errors: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)

    def download(self, *, offline: bool) -> str:
        import huggingface_hub

        return huggingface_hub.snapshot_download(
            self._name,
            revision=self._revision,
            cache_dir=self._cache,
            allow_patterns=self._patterns,
            local_files_only=offline,
        )

    def list_files(self) -> Listing:
        import huggingface_hub

        # By its commit: given a branch, a dry run too moves the cache's branch to what is not downloaded yet, and what
        # is there is not found offline any more.
        commit = huggingface_hub.HfApi().model_info(self._name, revision=self._revision or "main").sha
        with _without_bars():
            found = huggingface_hub.snapshot_download(
                self._name,
                revision=commit,
                cache_dir=self._cache,
                allow_patterns=self._patterns,
                dry_run=True,
            )
        files = (RemoteFile(f.filename, f.file_size or 0, f.file_size or 0 if f.is_cached else 0) for f in found)
        return Listing(self.cache(), tuple(files))

    def cache(self) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        return self._cache or Path(HF_HUB_CACHE)


@contextmanager
def _without_bars() -> Iterator[None]:
    """A listing is done in a moment, and nothing is downloaded."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    wanted = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if wanted:
            enable_progress_bars()


class ModelScope:
    """`modelscope`, whose part `modelscope_hub` talks to the hub."""

    def __init__(self, name: str, revision: str | None, cache: Path | None, patterns: Sequence[str]) -> None:
        from modelscope_hub.errors import HubError

        self._name, self._revision, self._cache, self._patterns = name, revision, cache, list(patterns)
        self.errors: tuple[type[Exception], ...] = (OSError, ValueError, HubError)

    def download(self, *, offline: bool) -> str:
        return self._download(self._revision, offline=offline)

    def _download(self, revision: str | None, *, offline: bool) -> str:
        from modelscope.hub.snapshot_download import snapshot_download

        download: Any = snapshot_download
        folder: str = download(
            self._name,
            revision=revision,
            cache_dir=self._cache,
            allow_patterns=self._patterns,
            local_files_only=offline,
        )
        return folder

    def list_files(self) -> Listing:
        import modelscope_hub

        endpoint = modelscope_hub.HubApi().resolve_endpoint_for_read(self._name)
        api: Any = modelscope_hub.HubApi(endpoint=endpoint)
        revision = self._revision or "master"  # the library's default for downloads; offline it takes any that is there
        found = [f for f in api.list_repo_files(self._name, "model", revision=revision) if self._is_wanted(f)]
        try:
            folder = Path(self._download(revision, offline=True))
        except self.errors:
            return Listing(self.cache(), tuple(RemoteFile(f.path, f.size, 0) for f in found))
        files = tuple(RemoteFile(f.path, f.size, _bytes_here(folder / f.path, f.size)) for f in found)
        return Listing(self.cache(), files)

    def cache(self) -> Path:
        from modelscope_hub.config import get_default_config

        return self._cache or Path(get_default_config().cache_dir)

    def _is_wanted(self, file: Any) -> bool:
        return not file.is_dir and any(fnmatch(file.path, pattern) for pattern in self._patterns)


def _bytes_here(file: Path, size: int) -> int:
    """Bytes already cached. ModelScope resumes a partial file and restarts one of the wrong size."""
    part = file.with_name(f"{file.name}.incomplete")
    if file.is_file():
        return size if file.stat().st_size == size else 0
    return min(size, part.stat().st_size) if part.is_file() else 0


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a write failed because the disk was full or a size limit was reached.

    The libraries wrap the system's error in others.
    """
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    wrapped = getattr(error, "failed_files", {}).values()  # ModelScope's, of a snapshot
    return (
        os.strerror(errno.ENOSPC) in str(error)  # hf_xet's, which is text alone
        or any(map(is_disk_full, wrapped))
        or is_disk_full(error.__cause__ or error.__context__)
    )
