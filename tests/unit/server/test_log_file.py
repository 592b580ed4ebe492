"""The log in a file: `--log-file`."""

import errno
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.settings import LogSettings

FULL = "/dev/full"  # every write fails as on a full disk


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Puts back what was there: settings replace it."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers = before


class Disk(io.StringIO):
    """A file whose disk may be full."""

    full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


def test_a_full_disk_is_reported_once_and_so_is_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, disk = tmp_path / "log", Disk()
    LogSettings(log_file=str(path)).apply()
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.FileHandler)
    handler.setStream(disk).close()  # type: ignore[arg-type, union-attr]
    for disk.full in (False, True, True, True, False, False):
        logging.error("lost" if disk.full else "kept")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"the log file {path} cannot be written, so lines may be lost: [Errno 28] No space left on device",
        f"the log file {path} can be written again",
    ]
    assert [line.rpartition(" ")[2] for line in disk.getvalue().splitlines()] == ["kept"] * 3


def test_log_settings_can_be_changed_while_the_disk_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    LogSettings(log_file=FULL).apply()
    logging.error("lost")
    LogSettings().apply()
    logging.error("not lost")
    assert "not lost" in capsys.readouterr().err


def test_a_line_that_is_wrong_itself_is_reported_as_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LogSettings(log_file=str(tmp_path / "log")).apply()
    logging.error("%d", "text")
    assert "TypeError" in capsys.readouterr().err


@pytest.mark.parametrize(("said", "level"), [("ExecuteBatchError raised in core by", "INFO"), ("Unexpected", "ERROR")])
def test_an_answer_that_comes_too_late_for_a_cancel_is_no_error(
    said: str, level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In gRPC's words, from its `_handle_exceptions`."""
    LogSettings().apply()
    try:
        raise RuntimeError
    except RuntimeError:
        logging.getLogger("grpc._cython.cygrpc").exception(f"{said} servicer method [%s]", "/some/Method")
    logged = capsys.readouterr().err
    assert f"{level} grpc._cython.cygrpc: {said} servicer method [/some/Method]" in logged
    assert ("Traceback" in logged) is (level == "ERROR")
