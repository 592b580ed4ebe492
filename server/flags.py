"""Readers of command-line values, and switches that may have a value after them."""

import argparse
from collections.abc import Callable
from typing import Any

MOST = 2**31 - 1


def switch(group: "argparse._ArgumentGroup", name: str, default: Any, text: str) -> None:
    """A flag that may stand alone or, as Triton's may, have true, false, 1 or 0 after it."""
    group.add_argument(f"--{name}", type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=text)


def boolean(text: str) -> bool:
    """true, false, 1 or 0."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r}: true or false is accepted")
    return text.lower() in ("true", "1")


def port(text: str) -> int:
    """A port; 0 for any."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: a port from 0 to 65535 is accepted")
    return int(text)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number above 0 is accepted")
    return int(text)


def count(text: str) -> int:
    """A whole number that gRPC takes."""
    if not text.isdecimal() or int(text) > MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 0 to {MOST} is accepted")
    return int(text)


def reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` as the type of an argument: what it says of a bad text reaches the user."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error

    return convert
