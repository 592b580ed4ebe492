"""Readers of command-line values, and switches that may have a value after them."""

import argparse
import math
import re
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


def seconds(text: str) -> float:
    """A time, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of seconds is accepted")
    return value


def positive_seconds(text: str) -> float:
    """A time above 0."""
    value = seconds(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of seconds above 0 is accepted")
    return value


def byte_size(text: str) -> int:
    """A number of bytes, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of bytes is accepted")
    return int(text)


def count(text: str) -> int:
    """A whole number that gRPC takes."""
    if not text.isdecimal() or int(text) > MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 0 to {MOST} is accepted")
    return int(text)


def device(text: str) -> str:
    """A device to compute on."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: auto, cpu, cuda or a GPU such as cuda:1 is accepted")
    return text


def reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` as the type of an argument: what it says of a bad text reaches the user."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error

    return convert
