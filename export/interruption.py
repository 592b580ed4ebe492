"""Ctrl-C and SIGTERM, made to stick."""

import signal
from typing import NoReturn


class Interruption:
    """Raises KeyboardInterrupt on SIGINT and SIGTERM, and again at every `check`.

    Python drops an exception that a signal raises inside a callback or a finaliser of a library, and the libraries
    under an export are full of them; `check` is where it comes up again.
    """

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come."""
        if self._asked:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: object) -> NoReturn:
        self._asked = True
        raise KeyboardInterrupt
