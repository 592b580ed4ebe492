"""The server's folder for temporary files: workers' sockets, what clients upload, what libraries unpack.

A server that is killed cannot remove its own; the next one does.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

PREFIX = "zserve-"
LOCK = "server.lock"  # locked for as long as the server lives; the system releases it however the server ends


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder that is removed at the end; also removes what killed servers of this user have left behind."""
    _remove_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        with (folder / "unlocked").open("w") as lock:
            with suppress(OSError):  # a file system without locks: nobody will remove the folder then
                fcntl.flock(lock, fcntl.LOCK_EX)
                Path(lock.name).rename(folder / LOCK)  # only now: nobody must ever see it unlocked
            yield folder


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else's, or its server lives
            if folder.lstat().st_uid != os.getuid():
                continue
            with (folder / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for inner in folder.iterdir():  # the lock last: without it the folder would stay if this is interrupted
                    if inner.is_dir() and not inner.is_symlink():
                        shutil.rmtree(inner)
                shutil.rmtree(folder)
                log.info("removed %s, which a server that was killed had left", folder)
