"""A log file whose disk may be full for a while."""

import contextlib
import logging
import sys


class LogFile(logging.FileHandler):
    """Says once on standard error that it cannot be written, and once that it can again.

    Python's own says it with a traceback for every line, and raises when it is closed.
    """

    def __init__(self, path: str) -> None:
        # File names in messages may be anything, also what UTF-8 cannot encode.
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._failure = ""  # why the last line could not be written

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line."""
        before, self._failure = self._failure, ""
        super().emit(record)
        if self._failure and not before:
            self._say(f"cannot be written, so lines may be lost: {self._failure}")
        elif before and not self._failure:
            self._say("can be written again")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Notes what the file system says; what is wrong with the line itself is reported as ever."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._failure = str(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        """Closes the file, even if what is left cannot be written: another handler may be about to take its place."""
        with contextlib.suppress(OSError):
            super().close()

    def _say(self, what: str) -> None:
        with contextlib.suppress(OSError):  # standard error may be on the same disk
            sys.stderr.write(f"the log file {self.baseFilename} {what}\n")
