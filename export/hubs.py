"""What the hubs' own libraries are asked: to download, to list, and where their caches are."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from export.checkpoint import WEIGHTS


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
    def missing(self) -> int:
        """Bytes to be downloaded."""
        return self.size - self.here


@dataclass(frozen=True)
class Listing:
    """The files of a checkpoint on a hub, and the folder that they are downloaded into."""

    cache: Path
    files: tuple[RemoteFile, ...]

    @property
    def missing(self) -> tuple[RemoteFile, ...]:
        """What is not here in full."""
        return tuple(f for f in self.files if f.missing)

    @property
    def missing_bytes(self) -> int:
        """How much would be downloaded."""
        return sum(f.missing for f in self.files)

    def weight_bytes(self, part: str) -> int:
        """The size of the weights in one folder of the checkpoint, as they are stored."""
        assert part in WEIGHTS
        return sum(f.size for f in self.files if fnmatch(f.name, f"{part}/*.safetensors"))


class Library(Protocol):
    """One hub's Python library. Its calls raise `errors`."""

    errors: tuple[type[Exception], ...]

    def download(self, name: str, revision: str | None, cache: Path | None, *, offline: bool) -> str:
        """The folder with the checkpoint's files, downloaded unless they are there or it is to ask nobody."""

    def list_files(self, name: str, revision: str | None, cache: Path | None) -> Listing:
        """What `download` would get."""

    def cache(self, chosen: Path | None) -> Path:
        """The cache: `chosen`, or what the library's own environment variables say."""


class HuggingFace:
    """`huggingface_hub`."""

    def __init__(self, patterns: Sequence[str]) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        self._patterns = list(patterns)
        # Its first base is the HTTP library's own error, of a connection that breaks or a proxy that refuses; which
        # library that is depends on the release. The hub's Rust part, hf_xet, raises RuntimeError.
        self.errors: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)

    def download(self, name: str, revision: str | None, cache: Path | None, *, offline: bool) -> str:
        import huggingface_hub

        return huggingface_hub.snapshot_download(
            name, revision=revision, cache_dir=cache, allow_patterns=self._patterns, local_files_only=offline
        )

    def list_files(self, name: str, revision: str | None, cache: Path | None) -> Listing:
        import huggingface_hub

        with _without_bars():
            found = huggingface_hub.snapshot_download(
                name, revision=revision, cache_dir=cache, allow_patterns=self._patterns, dry_run=True
            )
        files = (RemoteFile(f.filename, f.file_size or 0, f.file_size or 0 if f.is_cached else 0) for f in found)
        return Listing(self.cache(cache), tuple(files))

    def cache(self, chosen: Path | None) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        return chosen or Path(HF_HUB_CACHE)


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

    def __init__(self, patterns: Sequence[str]) -> None:
        from modelscope_hub.errors import HubError

        self._patterns = list(patterns)
        self.errors: tuple[type[Exception], ...] = (OSError, ValueError, HubError)

    def download(self, name: str, revision: str | None, cache: Path | None, *, offline: bool) -> str:
        from modelscope.hub.snapshot_download import snapshot_download

        download: Any = snapshot_download
        folder: str = download(
            name, revision=revision, cache_dir=cache, allow_patterns=self._patterns, local_files_only=offline
        )
        return folder

    def list_files(self, name: str, revision: str | None, cache: Path | None) -> Listing:
        import modelscope_hub

        api: Any = modelscope_hub.HubApi()
        api = modelscope_hub.HubApi(endpoint=api.resolve_endpoint_for_read(name))
        found = [f for f in api.list_repo_files(name, "model", revision=revision) if self._is_wanted(f)]
        try:
            folder = Path(self.download(name, revision, cache, offline=True))
        except self.errors:
            return Listing(self.cache(cache), tuple(RemoteFile(f.path, f.size, 0) for f in found))
        files = tuple(RemoteFile(f.path, f.size, _bytes_here(folder / f.path, f.size)) for f in found)
        return Listing(self.cache(cache), files)

    def cache(self, chosen: Path | None) -> Path:
        from modelscope_hub.config import get_default_config

        return chosen or Path(get_default_config().cache_dir)

    def _is_wanted(self, file: Any) -> bool:
        return not file.is_dir and any(fnmatch(file.path, pattern) for pattern in self._patterns)


def _bytes_here(file: Path, size: int) -> int:
    """Of a file of `size` bytes; ModelScope goes on with a part, and begins anew with a file of another size."""
    part = file.with_name(f"{file.name}.incomplete")
    if file.is_file():
        return size if file.stat().st_size == size else 0
    return min(size, part.stat().st_size) if part.is_file() else 0


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a limit, is what ended a write; the libraries wrap the system's error in others."""
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
