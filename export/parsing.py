"""JSON into frozen dataclasses, by their type hints."""

from dataclasses import is_dataclass
from enum import Enum
from itertools import repeat
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


def parsed(kind: Any, raw: Any) -> Any:
    """`raw`, as the json module gives it, as a `kind`: dataclasses, tuples, dicts, enums, optional and plain values.

    Raises:
        TypeError, ValueError, KeyError: it is not of that kind, or holds keys that do not belong.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if unknown := set(raw) - set(hints):
            raise ValueError(f"unknown fields {sorted(unknown)}")
        return kind(**{name: parsed(hints[name], value) for name, value in raw.items()})  # type: ignore[operator]
    if origin is tuple:
        kinds = repeat(inner[0], len(raw)) if inner[-1] is ... else inner
        return tuple(parsed(k, value) for k, value in zip(kinds, raw, strict=True))
    if origin is dict:
        return {parsed(inner[0], key): parsed(inner[1], value) for key, value in raw.items()}
    if origin is UnionType:
        return None if raw is None else parsed(inner[0], raw)
    if issubclass(kind, Enum):
        return kind(raw)
    if not isinstance(raw, (int, float) if kind is float else kind):
        raise TypeError(f"{raw!r} is not {kind.__name__}")
    return raw
