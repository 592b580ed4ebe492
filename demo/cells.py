"""Grids of cells: neighbours, growing and connected pieces."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Labels = NDArray[np.int64]
Cells = TypeVar("Cells", Mask, Labels, NDArray[np.int8])


def neighbourhoods(cells: Cells) -> Cells:
    """Every cell with its eight neighbours, [9, h, w]; the border's cells are their own neighbours outside."""
    h, w = cells.shape
    padded = np.pad(cells, 1, mode="edge")
    neighbours: Cells = np.stack([padded[dy : dy + h, dx : dx + w] for dy in range(3) for dx in range(3)])
    return neighbours


def grown(cells: Mask, reach: int) -> Mask:
    """With all cells up to `reach` away, also diagonally."""
    for _ in range(reach):
        cells = np.any(neighbourhoods(cells), axis=0)
    return cells


def connected(cells: Mask) -> Labels:
    """A number for every connected piece, int64 [h, w]; 0 is no cell."""
    labels = np.zeros(cells.shape, np.int64)
    if not cells.any():
        return labels
    rows, columns = np.nonzero(cells)
    box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    inside = cells[box]
    spread: Labels = np.where(inside, np.arange(1, inside.size + 1).reshape(inside.shape), 0)
    while not np.array_equal(labels[box], spread):
        labels[box] = spread
        spread = np.where(inside, neighbourhoods(spread).max(0), 0)
    return labels
