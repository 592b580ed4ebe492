"""Where a checkpoint comes from: a folder, Hugging Face or ModelScope, fetched into the libraries' own caches."""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from export.checkpoint import WEIGHTS, Checkpoint, open_checkpoint
from export.errors import DamagedFileError, SourceError

# Nothing else in the repositories is needed: pictures, and on one of them a copy in another format.
PATTERNS = ["model_index.json", "scheduler/*", "tokenizer/*", *(f"{part}/*" for part in WEIGHTS)]


class Hub(StrEnum):
    """The kinds of source."""

    LOCAL = "local"
    HUGGINGFACE = "huggingface"
    MODELSCOPE = "modelscope"


class Network(Enum):
    """Whether a hub may be asked."""

    ONLINE = "online"
    OFFLINE = "offline"


@dataclass(frozen=True)
class Source:
    """A checkpoint by name. `cache_dir` None: HF_HOME or MODELSCOPE_CACHE, as the libraries themselves have it."""

    hub: Hub
    name: str  # a folder, or owner/name on a hub
    revision: str | None = None
    cache_dir: Path | None = None
    network: Network = Network.ONLINE

    def open(self) -> Checkpoint:
        """The checkpoint, downloaded where it is not cached yet, and checked.

        Raises:
            SourceError: a hub does not have it, or cannot be reached.
            CheckpointError: it is damaged or not supported; the message has the command that repairs it.
        """
        folder = self.fetch()
        try:
            return open_checkpoint(folder)
        except DamagedFileError as error:
            if self.hub is Hub.LOCAL:
                raise
            # Not resolved: in Hugging Face's cache the file itself is a link to a blob without a name.
            file = error.path.relative_to(folder.resolve())
            raise DamagedFileError(error.path, error.problem, f"repair it: {self.repair_command(file)}") from None

    def fetch(self) -> Path:
        """The checkpoint's folder on this machine."""
        if self.hub is Hub.LOCAL:
            return Path(self.name)
        return Path(self._download())

    def cached(self) -> "Source":
        """The same, without asking the hub."""
        return replace(self, network=Network.OFFLINE)

    def repair_command(self, file: Path | None = None) -> str:
        """The shell command that downloads `file`, or everything, anew."""
        words = ["hf" if self.hub is Hub.HUGGINGFACE else "modelscope", "download", self.name]
        if file is None:
            words += [word for pattern in PATTERNS for word in ("--include", pattern)]
        else:
            words += [str(file), "--force-download" if self.hub is Hub.HUGGINGFACE else "--force"]
        words += ["--revision", self.revision] if self.revision else []
        words += ["--cache-dir", str(self.cache_dir)] if self.cache_dir else []
        return shlex.join(words)

    def _download(self) -> str:
        download, errors = _library(self.hub)
        try:
            return download(
                self.name,
                revision=self.revision,
                cache_dir=self.cache_dir,
                allow_patterns=PATTERNS,
                local_files_only=self.network is Network.OFFLINE,
            )
        except errors as error:
            where = "the cache" if self.network is Network.OFFLINE else self.hub
            raise SourceError(
                f"{self.name} at revision {self.revision or 'latest'} cannot be had from {where} "
                f"({str(error).strip().splitlines()[0]}); check the name and the network, or download it "
                f"elsewhere into the same cache: {self.repair_command()}"
            ) from error


def _library(hub: Hub) -> tuple[Callable[..., str], tuple[type[Exception], ...]]:
    """The hub's own download function, and what it raises."""
    if hub is Hub.HUGGINGFACE:
        import huggingface_hub

        return huggingface_hub.snapshot_download, (OSError, ValueError)
    from modelscope.hub.snapshot_download import snapshot_download
    from modelscope_hub.errors import HubError

    modelscope: Any = snapshot_download
    return modelscope, (OSError, ValueError, HubError)


def network_from_environment() -> Network:
    """Offline where Hugging Face's own switch, HF_HUB_OFFLINE, says so."""
    return Network.OFFLINE if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else Network.ONLINE
