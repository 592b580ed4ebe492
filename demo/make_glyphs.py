"""Write glyphs.npz, the signed distances of the demo's characters, from a CJK font.

Run once: `python -m demo.make_glyphs FONT.ttc` (Noto Sans CJK Bold made the committed file). Needs pillow.
"""

import sys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from demo.shapes import CHARACTERS, GLYPH_CELLS, GLYPH_FILE, GLYPH_UNIT

INK = 768  # pixels of the drawing that the distances are measured in
SIMPLIFIED = 2  # the face of the collection for simplified Chinese
MARGIN = 0.95  # the ink's longer side, as a share of the square


def main(font_path: str) -> None:
    tables = np.stack([_distances(_ink(character, font_path)) for character in CHARACTERS])
    np.savez_compressed(GLYPH_FILE, distances=tables)


def _ink(character: str, font_path: str) -> NDArray[np.bool_]:
    """The character centred in a square, its longer side MARGIN of it: bool [INK, INK]."""
    font = ImageFont.truetype(font_path, INK, index=SIMPLIFIED)
    left, top, right, bottom = font.getbbox(character)
    width, height = int(right - left), int(bottom - top)
    drawing = Image.new("L", (width, height))
    ImageDraw.Draw(drawing).text((-left, -top), character, font=font, fill=255)
    scale = MARGIN * INK / max(width, height)
    drawing = drawing.resize((round(width * scale), round(height * scale)))
    square = Image.new("L", (INK, INK))
    square.paste(drawing, ((INK - drawing.width) // 2, (INK - drawing.height) // 2))
    return np.asarray(square) > 127


def _distances(ink: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Signed distance at GLYPH_CELLS by GLYPH_CELLS cell centres in units of GLYPH_UNIT, negative inside."""
    edge = ink ^ np.roll(ink, 1, 0) | ink ^ np.roll(ink, 1, 1)
    rows, columns = (index.astype(np.float32) for index in np.nonzero(edge))
    centres = (np.arange(GLYPH_CELLS, dtype=np.float32) + 0.5) * (INK / GLYPH_CELLS)
    inside = ink[np.ix_(centres.astype(int), centres.astype(int))]
    near = [np.hypot(rows - y, columns - x[:, None]).min(1) for y in centres for x in [centres]]
    distance = np.stack(near) * (2 / INK) * np.where(inside, -1, 1)
    table: NDArray[np.int8] = np.clip(np.round(distance / GLYPH_UNIT), -127, 127).astype(np.int8)
    return table


if __name__ == "__main__":
    main(sys.argv[1])
