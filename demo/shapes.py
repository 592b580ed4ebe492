"""Signed distances of everything drawn, written once for numpy and torch.

Every function takes an array namespace `xp` (numpy or torch) and unit coordinates `x`, `y` (y points down;
the drawn shape is about one unit in radius) and returns the signed distance to the outline, negative inside.
A shape of radius r is `r * distance(xp, name, x / r, y / r)`.
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Outline = Callable[[Any, Any, Any], Any]

CHARACTERS = "福春水山火木月花龙爱乐家"
GLYPH_FILE = Path(__file__).with_name("glyphs.npz")
GLYPH_CELLS = 96
GLYPH_UNIT = 1 / 256  # distance of one step of the int8 table


def distance(xp: Any, name: str, x: Any, y: Any) -> Any:
    """The signed distance of a shape or of a character."""
    return SHAPES[name](xp, x, y) if name in SHAPES else _glyph(xp, CHARACTERS.index(name), x, y)


def _circle(xp: Any, x: Any, y: Any) -> Any:
    return xp.sqrt(x * x + y * y) - 1.0


def _ring(xp: Any, x: Any, y: Any) -> Any:
    return xp.abs(xp.sqrt(x * x + y * y) - 0.8) - 0.2


def _square(xp: Any, x: Any, y: Any) -> Any:
    return xp.maximum(xp.abs(x), xp.abs(y)) - 0.86


def _cross(xp: Any, x: Any, y: Any) -> Any:
    upright = xp.maximum(xp.abs(x) - 0.3, xp.abs(y) - 1.0)
    lying = xp.maximum(xp.abs(x) - 1.0, xp.abs(y) - 0.3)
    return xp.minimum(upright, lying)


def _triangle(xp: Any, x: Any, y: Any) -> Any:
    return xp.maximum((math.sqrt(3.0) * xp.abs(x) - (y + 1.0)) / 2, y - 0.6)


def _diamond(xp: Any, x: Any, y: Any) -> Any:
    return (xp.abs(x) / 0.7 + xp.abs(y) - 1.0) / math.hypot(1 / 0.7, 1.0)


def _semicircle(xp: Any, x: Any, y: Any) -> Any:
    return xp.maximum(_circle(xp, x, y - 0.45), y - 0.45)


def _crescent(xp: Any, x: Any, y: Any) -> Any:
    x = x - 0.19
    bite = xp.sqrt((x - 0.45) ** 2 + y * y) - 0.8
    return xp.maximum(_circle(xp, x, y), -bite)


def _arrow(xp: Any, x: Any, y: Any) -> Any:
    """Pointing up."""
    head = xp.maximum((0.9 * xp.abs(x) - 0.78 * (y + 1.0)) / math.hypot(0.9, 0.78), y + 0.1)
    shaft = xp.maximum(xp.abs(x) - 0.28, xp.abs(y - 0.4) - 0.55)
    return xp.minimum(head, shaft)


def _star(xp: Any, x: Any, y: Any) -> Any:
    """Five points, one of them up: the distance to the edge from a tip to the next inner corner."""
    sector, inner = 2 * math.pi / 5, 0.42
    angle = xp.remainder(xp.arctan2(x, -y) + sector / 2, sector) - sector / 2
    radius = xp.sqrt(x * x + y * y)
    along, across = radius * xp.cos(angle), radius * xp.abs(xp.sin(angle))
    edge_x, edge_y = inner * math.cos(sector / 2) - 1.0, inner * math.sin(sector / 2)
    return ((along - 1.0) * edge_y - across * edge_x) / math.hypot(edge_x, edge_y)


def _heart(xp: Any, x: Any, y: Any) -> Any:
    """Two round lobes over a right-angled tip."""
    scale = 0.62
    x, y = xp.abs(x) * scale, 0.55 - y * scale
    lobe = xp.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - math.sqrt(2.0) / 4
    along = (x + y) / 2
    along = (along + xp.abs(along)) / 2
    to_top, to_side = x * x + (y - 1.0) ** 2, (x - along) ** 2 + (y - along) ** 2
    tip = xp.sqrt(xp.minimum(to_top, to_side)) * xp.sign(x - y)
    return xp.where(x + y > 1.0, lobe, tip) / scale


def _glyph(xp: Any, index: int, x: Any, y: Any) -> Any:
    """A character's distance table read between its cells; outside the table the distance to its edge adds."""
    table = xp.asarray(_glyph_tables()[index], device=x.device)
    across, down = _cell(xp, x), _cell(xp, y)
    left, top = _whole(xp, across), _whole(xp, down)
    u, v = across - left, down - top
    upper = table[top, left] * (1 - u) + table[top, left + 1] * u
    lower = table[top + 1, left] * (1 - u) + table[top + 1, left + 1] * u
    beyond = xp.maximum(xp.abs(x), xp.abs(y)) - 1.0
    return upper * (1 - v) + lower * v + (beyond + xp.abs(beyond)) / 2


def _cell(xp: Any, place: Any) -> Any:
    return xp.clip((place + 1.0) * (GLYPH_CELLS / 2) - 0.5, 0.0, GLYPH_CELLS - 1.001)


def _whole(xp: Any, cell: Any) -> Any:
    return xp.asarray(cell, dtype=xp.int64)


@cache
def _glyph_tables() -> NDArray[np.float32]:
    """Distances of CHARACTERS, float32 [characters, GLYPH_CELLS, GLYPH_CELLS]."""
    with np.load(GLYPH_FILE) as stored:
        tables: NDArray[np.float32] = stored["distances"].astype(np.float32) * np.float32(GLYPH_UNIT)
    return tables


SHAPES: dict[str, Outline] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "diamond": _diamond,
    "heart": _heart,
    "crescent": _crescent,
    "arrow": _arrow,
    "semicircle": _semicircle,
}
DRAWABLE = (*SHAPES, *CHARACTERS)
