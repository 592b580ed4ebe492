"""Reads an image and says whether its background, colours, layout and shapes are what was asked for.

The image is reduced to a grid of about 200 cells on its short side, every cell is named by the nearest of the
grammar's colours and of the background asked for at its place, and each thing's cells are compared with every
outline, sharp and blurred, at about equal area and centre.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from demo.cells import Labels, Mask, connected, grown, neighbourhoods
from demo.scenes import Image, Scene, ground_mix
from demo.shapes import CHARACTERS, DRAWABLE, distance
from demo.words import COLOURS, Thing

Floats = NDArray[np.float32]
Names = NDArray[np.int8]

GRID = 100  # cells on the short side, at least; at most twice as many
STRAY_COLOUR = 40  # RGB distance within which a colour is one that nobody asked for
NEAR_COLOUR = 50  # RGB distance within which a background cell is right
BORDER_SHARE = 0.9  # of the border's cells that must be right
SMALLEST_AREA = 0.004  # of the short side's square: less of a colour is none of it
STRAY_AREA = 0.015  # of the short side's square: as much of a colour nobody asked for is a fault
PLACE_TOLERANCE = 0.15  # of half the image, on each axis
SIZE_TOLERANCE = 1.2  # ratio of radii; small, middling and large are 1.45 apart
OVERLAP, GLYPH_OVERLAP = 0.6, 0.45  # intersection over union with the outline asked for
SCRAP = 0.25  # of a thing's largest piece: a smaller one may be another thing's edge
EDGE = 4  # cells that an edge reaches from its thing
SCALES = (0.85, 0.92, 1.0, 1.08, 1.17, 1.27)  # an outline drawn thin has less area for its extent
SOFTNESS = (0.0, 0.08, 0.16)  # blur in radii: a small shape drawn blurred has lost its corners
GROUND = len(COLOURS)  # the name of a cell nearest to the background asked for
SAME = 1.0  # squared distances closer than this are equal
PATCH, PATCH_REACH = 56, 1.3  # the canonical patch: cells a side, and half its width at unit area
OUTLINE_CELLS, OUTLINE_REACH = 256, 1.1


@dataclass(frozen=True)
class Score:
    """One verdict a question; a fault in one leaves the others as they are."""

    background: bool
    colours: bool
    layout: bool
    shapes: bool

    @property
    def all_correct(self) -> bool:
        return self.background and self.colours and self.layout and self.shapes


def score(image: Image, scene: Scene) -> Score:
    """Score an image, uint8 [H, W, 3], of any size from 96x96 against the scene it was asked for."""
    cells = _reduce(image)
    asked = _ground_asked(cells.shape[0], cells.shape[1], scene)
    names = _names(cells, asked, scene)
    ground = np.linalg.norm(cells - asked, axis=-1) < NEAR_COLOUR
    open_cells = (names >= 0) & ~ground & ~np.isin(names, _ground_names(names, scene))
    masks, found = _thing_masks(names, open_cells, scene)
    border = np.concatenate([ground[0], ground[-1], ground[:, 0], ground[:, -1]])
    right_ground = bool(border.mean() >= BORDER_SHARE)
    # On a wrong background nobody can tell what else was not asked for.
    stray = int((open_cells & ~np.any(masks, axis=0)).sum()) if right_ground else 0
    return Score(
        background=right_ground,
        colours=found and stray < STRAY_AREA * min(names.shape) ** 2,
        layout=all(_placed_right(m, t) for m, t in zip(masks, scene.things, strict=True)),
        shapes=all(_shape_name(m) == t.shape for m, t in zip(masks, scene.things, strict=True)),
    )


def _reduce(image: Image) -> Floats:
    """Mean over square blocks, so that the short side keeps GRID to 2 GRID cells: float32 [h, w, 3]."""
    block = max(1, min(image.shape[:2]) // GRID)
    h, w = image.shape[0] // block, image.shape[1] // block
    rows = image[: h * block, : w * block].reshape(h, block, w * block * 3).sum(axis=1, dtype=np.uint16)
    sums = rows.reshape(h, w, block, 3).sum(axis=2, dtype=np.uint32)
    cells: Floats = (sums / np.float32(block * block)).astype(np.float32)
    return cells


def _names(cells: Floats, asked: Floats, scene: Scene) -> Names:
    """Index of each cell's colour in the grammar, int8 [h, w]; background and lone cells have none (-1).

    It is the nearest of the colours asked for, the background's at its place among them. A colour nobody asked for
    is named only where a cell comes near it, because every edge passes through some other colour.
    """
    palette = np.array(list(COLOURS.values()), np.float32)
    distances = (palette**2).sum(1) - 2 * (cells @ palette.T) + (cells**2).sum(-1, keepdims=True)
    wanted = [name in {thing.colour for thing in scene.things} for name in COLOURS]
    distances[~np.array(wanted) & (distances > STRAY_COLOUR**2)] = np.inf
    ground_distance = ((cells - asked) ** 2).sum(-1)
    names = np.where(ground_distance < distances.min(-1) + SAME, GROUND, distances.argmin(-1)).astype(np.int8)
    alike = (neighbourhoods(names) == names).sum(0)
    return np.where((alike >= 5) & (names != GROUND), names, -1)


def _ground_asked(h: int, w: int, scene: Scene) -> Floats:
    """The background's colour at every cell, float32 [h, w, 3]."""
    x, y = np.meshgrid(_axis(w), _axis(h))
    first, second = (np.array(COLOURS[c], np.float32) for c in (scene.background.first, scene.background.second))
    asked: Floats = first + ground_mix(np, scene.background.kind, x, y)[..., None] * (second - first)
    return asked


def _ground_names(names: Names, scene: Scene) -> list[int]:
    """Names of background: the colours asked for, and another one if most of the border has it."""
    palette = list(COLOURS)
    asked = [palette.index(scene.background.first), palette.index(scene.background.second)]
    border = np.concatenate([names[0], names[-1], names[:, 0], names[:, -1]])
    counts = np.bincount(border[border >= 0].astype(np.int64), minlength=len(COLOURS))
    return [*asked, int(counts.argmax())] if 2 * counts.max() > border.size else asked


def _thing_masks(names: Names, open_cells: Mask, scene: Scene) -> tuple[list[Mask], bool]:
    """Each thing's cells, and whether every thing has its colour.

    Things of one colour share its cells by nearness. A thing missing from its colour is looked for among the
    open cells that belong to nothing else, so a wrong colour does not also count as a wrong place or shape.
    """
    things = scene.things
    masks = [_own_cells(names == list(COLOURS).index(t.colour), t, _alike(t, things)) for t in things]
    smallest = SMALLEST_AREA * min(names.shape) ** 2
    missing = [i for i, mask in enumerate(masks) if mask.sum() < smallest]
    rest = open_cells & ~np.any(masks, axis=0)
    for i in missing:
        masks[i] = _own_cells(rest, things[i], [things[j] for j in missing])
    return _without_edges(masks, things), not missing


def _alike(thing: Thing, things: tuple[Thing, ...]) -> list[Thing]:
    return [other for other in things if other.colour == thing.colour]


def _own_cells(cells: Mask, thing: Thing, sharing: list[Thing]) -> Mask:
    """The cells nearer to a thing's place than to the places of the others that share them."""
    if len(sharing) == 1:
        return cells
    x, y = np.meshgrid(_axis(cells.shape[1]), _axis(cells.shape[0]))
    distances = np.stack([(x - t.place[0]) ** 2 + (y - t.place[1]) ** 2 for t in sharing])
    own: Mask = cells & (distances.argmin(0) == sharing.index(thing))
    return own


def _without_edges(masks: list[Mask], things: tuple[Thing, ...]) -> list[Mask]:
    """Things without each other's edges: a blend of two colours may look like a third that was asked for.

    Only small pieces that lie close about a thing of another colour are left out: all others are faults of the picture.
    """
    if len({thing.colour for thing in things}) == 1:
        return masks
    pieces = [connected(mask) for mask in masks]
    bodies = [grown(labels == _sizes(labels).argmax(), EDGE) if labels.any() else labels > 0 for labels in pieces]
    cleaned = []
    for labels, thing in zip(pieces, things, strict=True):
        others = [body for body, other in zip(bodies, things, strict=True) if other.colour != thing.colour]
        cleaned.append((labels > 0) & ~_edges(labels, np.any(others, axis=0)))
    return cleaned


def _edges(labels: Labels, near: Mask) -> Mask:
    """The small pieces that lie wholly in the cells near others."""
    sizes = _sizes(labels)
    edges = sizes < SCRAP * sizes.max()
    edges[labels[~near]] = False
    mask: Mask = edges[labels]
    return mask


def _sizes(labels: Labels) -> Labels:
    """Cells of each piece; none of what is no piece."""
    sizes: Labels = np.bincount(labels.ravel())
    sizes[0] = 0
    return sizes


def _axis(cells: int) -> Floats:
    axis: Floats = (np.arange(cells, dtype=np.float32) * 2 + 1) / np.float32(cells) - 1
    return axis


def _placed_right(mask: Mask, thing: Thing) -> bool:
    """Whether a mask's centre and size are those of the thing asked for."""
    if not mask.any():
        return False
    h, w = mask.shape
    rows, columns = np.nonzero(mask)
    short, (shift, area) = min(h, w), _centroid_and_area(thing.shape)
    x = _axis(w)[columns].mean() - shift[0] * thing.nominal * short / w
    y = _axis(h)[rows].mean() - shift[1] * thing.nominal * short / h
    larger = math.sqrt(len(rows) / area) / (thing.nominal * short / 2)
    near = max(abs(x - thing.place[0]), abs(y - thing.place[1])) < PLACE_TOLERANCE
    return bool(near and 1 / SIZE_TOLERANCE < larger < SIZE_TOLERANCE)


def _shape_name(mask: Mask) -> str:
    """The outline that overlaps the mask best, at about equal area, or "" if none does well."""
    if not mask.any():
        return ""
    patch, outlines = _canonical_patch(mask).ravel().astype(np.float32), _outlines()
    common = outlines @ patch
    overlap = (common / (outlines.sum(-1) + patch.sum() - common)).max(axis=0)
    best = int(overlap.argmax())
    name = DRAWABLE[best]
    return name if overlap[best] > (GLYPH_OVERLAP if name in CHARACTERS else OVERLAP) else ""


def _canonical_patch(mask: Mask, scale: float = 1.0) -> Mask:
    """The mask moved to its centre and scaled to unit area times scale squared, bool [PATCH, PATCH]."""
    rows, columns = np.nonzero(mask)
    reach = PATCH_REACH * math.sqrt(len(rows)) / scale
    y = np.round(rows.mean() + _axis(PATCH) * reach).astype(int)
    x = np.round(columns.mean() + _axis(PATCH) * reach).astype(int)
    inside = ((y >= 0) & (y < mask.shape[0]))[:, None] & ((x >= 0) & (x < mask.shape[1]))
    patch: Mask = inside & mask[np.ix_(y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1))]
    return patch


@cache
def _outlines() -> Floats:
    """Everything drawable, softened and scaled, as canonical patches: float32 [variants, outlines, PATCH * PATCH]."""
    drawn = [[_softened(name, softness) for name in DRAWABLE] for softness in SOFTNESS]
    patches = [[_canonical_patch(mask, scale).ravel() for mask in masks] for masks in drawn for scale in SCALES]
    return np.array(patches, np.float32)


def _softened(name: str, softness: float) -> Mask:
    """A shape as it is read from a blurred picture; characters are drawn too large to suffer."""
    if name in CHARACTERS or not softness:
        return _outline(name)
    cells = np.arange(OUTLINE_CELLS, dtype=np.float32)
    sigma = softness * OUTLINE_CELLS / (2 * OUTLINE_REACH)
    blur = np.exp(-((cells - cells[:, None]) ** 2) / (2 * sigma**2))
    soft: Mask = blur @ _outline(name) @ blur > blur[OUTLINE_CELLS // 2].sum() ** 2 / 2
    return soft


@cache
def _outline(name: str) -> Mask:
    """A shape filled at unit radius, bool [OUTLINE_CELLS, OUTLINE_CELLS]."""
    x, y = np.meshgrid(_axis(OUTLINE_CELLS) * OUTLINE_REACH, _axis(OUTLINE_CELLS) * OUTLINE_REACH)
    filled: Mask = distance(np, name, x, y) < 0
    return filled


@cache
def _centroid_and_area(name: str) -> tuple[tuple[float, float], float]:
    """The centroid and the area of a shape of unit radius."""
    rows, columns = np.nonzero(_outline(name))
    axis = _axis(OUTLINE_CELLS) * OUTLINE_REACH
    area = len(rows) * (2 * OUTLINE_REACH / OUTLINE_CELLS) ** 2
    return (float(axis[columns].mean()), float(axis[rows].mean())), area
