"""Where a checkpoint comes from: a folder, Hugging Face or ModelScope, fetched into the libraries' own caches."""

import shlex
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from export.checkpoint import WEIGHTS, Checkpoint, open_checkpoint
from export.errors import DamagedFileError, ResourcesError, SourceError
from export.hubs import Hub, HuggingFace, Library, Listing, ModelScope, is_disk_full

# Nothing else in the repositories is needed: pictures, and on one of them a copy in another format.
PATTERNS = ["model_index.json", "scheduler/*", "tokenizer/*", *(f"{part}/*" for part in WEIGHTS)]


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
            ResourcesError: the disk of the cache is full.
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

    def listing(self) -> Listing | None:
        """What the hub has, and what of it is here; None where no hub is to be asked.

        Raises:
            SourceError: the hub does not have it, or cannot be reached.
        """
        if self.hub is Hub.LOCAL or self.network is Network.OFFLINE:
            return None
        library = self._library()
        try:
            return library.list_files()
        except library.errors as error:
            raise self._unavailable(error) from error

    def _download(self) -> str:
        library = self._library()
        offline = self.network is Network.OFFLINE
        try:
            return library.download(offline=offline)
        except library.errors as error:
            if is_disk_full(error):
                raise ResourcesError(
                    f"the disk of {library.cache()} was full before all of {self.name} was there; free "
                    "some, or give another --cache-dir. The same command goes on with what is missing"
                ) from error
            raise self._unavailable(error) from error

    def _library(self) -> Library:
        library = HuggingFace if self.hub is Hub.HUGGINGFACE else ModelScope
        return library(self.name, self.revision, self.cache_dir, PATTERNS)

    def _unavailable(self, error: Exception) -> SourceError:
        where = "the cache" if self.network is Network.OFFLINE else self.hub
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return SourceError(
            f"{self.name} at revision {self.revision or 'latest'} cannot be had from {where} ({reason}); check the "
            f"name and the network, or download it elsewhere into the same cache: {self.repair_command()}"
        )


def network_from_environment() -> Network:
    """Offline where Hugging Face's own switch, HF_HUB_OFFLINE, says so."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return Network.OFFLINE if HF_HUB_OFFLINE else Network.ONLINE
