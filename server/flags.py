"""Readers of command-line values, and switches that may have a value after them."""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
MOST = 2**31 - 1


def switch(group: "argparse._ArgumentGroup", name: str, text: str, *, default: bool = False) -> None:
    """Adds a flag that may stand alone or, as in Triton, be followed by true, false, 1 or 0."""
    group.add_argument(f"--{name}", type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=text)


def boolean(text: str) -> bool:
    """true, false, 1 or 0."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r}: true or false is accepted")
    return text.lower() in ("true", "1")


def whole(low: int, high: float, what: str) -> Callable[[str], int]:
    """A reader of whole numbers from `low` to `high`; `what` names them in the error message."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: {what} is accepted")
        return int(text)

    return read


port = whole(0, 65535, "a port from 0 to 65535")  # 0 for any
positive = whole(1, math.inf, "a whole number above 0")
count = whole(0, MOST, f"a whole number from 0 to {MOST}")  # the range that gRPC takes
byte_size = whole(0, math.inf, "a whole number of bytes")


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


def device(text: str) -> str:
    """A device to compute on."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: auto, cpu, cuda or a GPU such as cuda:1 is accepted")
    return text


def one_of(known: Iterable[T]) -> Callable[[str], T]:
    """What reads one of `known`, by its text."""
    by_text = {str(value): value for value in known}

    def read(text: str) -> T:
        if text not in by_text:
            raise ValueError(f"{text!r} is not accepted; {', '.join(by_text)} are")
        return by_text[text]

    return read


def reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` as the type of an argument: its error message for a bad text reaches the user."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error

    return convert
