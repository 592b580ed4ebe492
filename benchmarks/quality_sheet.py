"""Pictures of several engines beside each other, with their differences from the first magnified underneath."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from server.worker.images import Pixels

MAGNIFIED = 32
TITLE = 24  # pixels above each picture
GAP = 4


def contact_sheet(columns: Mapping[str, Sequence[Pixels]]) -> Image.Image:
    """A column for each name, all with the same number of pictures, which have the first one's size.

    Under every picture is its difference from the first column's, channel by channel, times MAGNIFIED.
    """
    first = next(iter(columns.values()))
    h, w = first[0].shape[:2]
    size = (len(columns) * (w + GAP) - GAP, len(first) * 2 * (h + TITLE))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, (name, pictures) in enumerate(columns.items()):
        x = column * (w + GAP)
        for row, (picture, expected) in enumerate(zip(pictures, first, strict=True)):
            y = row * 2 * (h + TITLE)
            pen.text((x + 2, y + 3), name, fill="black", font=font)
            sheet.paste(Image.fromarray(picture), (x, y + TITLE))
            pen.text((x + 2, y + h + TITLE + 3), f"difference x {MAGNIFIED}", fill="black", font=font)
            sheet.paste(Image.fromarray(magnified(picture, expected)), (x, y + h + 2 * TITLE))
    return sheet


def magnified(picture: Pixels, expected: Pixels) -> Pixels:
    """The absolute difference times MAGNIFIED, at most 255."""
    return (np.abs(picture.astype(int) - expected) * MAGNIFIED).clip(0, 255).astype(np.uint8)
