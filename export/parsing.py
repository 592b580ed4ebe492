"""JSON into frozen dataclasses, by their type hints."""

from dataclasses import is_dataclass
from enum import Enum
from itertools import repeat
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


def parsed(kind: Any, raw: Any) -> Any:
    """`raw`, as the json module gives it, as a `kind`.

    That may be a dataclass, tuple, dict, enum, path or plain value, or one of these that may be None.

    Raises:
        TypeError, ValueError, KeyError: it is not of that kind, or holds keys that do not belong.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        _check_is(raw, dict)
        hints = get_type_hints(kind)
        if unknown := set(raw) - set(hints):
            raise ValueError(f"unknown fields {sorted(unknown)}")
        return kind(**{name: parsed(hints[name], value) for name, value in raw.items()})  # type: ignore[operator]
    if origin is tuple:
        _check_is(raw, (list, tuple))
        kinds = repeat(inner[0], len(raw)) if inner[-1] is ... else inner
        return tuple(parsed(k, value) for k, value in zip(kinds, raw, strict=True))
    if origin is dict:
        _check_is(raw, dict)
        return {parsed(inner[0], key): parsed(inner[1], value) for key, value in raw.items()}
    if origin is UnionType:
        return None if raw is None else parsed(inner[0], raw)
    if issubclass(kind, Enum | Path):
        return kind(raw)
    _check_is(raw, (float, int) if kind is float else kind)
    return raw


def _check_is(raw: Any, kinds: type | tuple[type, ...]) -> None:
    """Raises TypeError unless `raw` is of `kinds`; to Python true and false are numbers, here they are not."""
    first = kinds[0] if isinstance(kinds, tuple) else kinds
    if not isinstance(raw, kinds) or (isinstance(raw, bool) and first is not bool):
        raise TypeError(f"{raw!r} is not {first.__name__}")
