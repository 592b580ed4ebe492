"""File names from prompts."""

import re
import unicodedata
from collections.abc import Collection
from pathlib import Path

LONGEST = 60  # characters; file systems take 255 bytes, and a Chinese character is three


def slug(prompt: str) -> str:
    """The prompt as a file name: letters and digits of any script, the rest as single dashes."""
    text = unicodedata.normalize("NFKC", prompt).lower()
    return re.sub(r"[\W_]+", "-", text)[:LONGEST].strip("-") or "image"


def distinct(stem: str, taken: Collection[str]) -> str:
    """`stem`, or `stem`-2, -3 ... where it is taken."""
    candidate, number = stem, 1
    while candidate in taken:
        number += 1
        candidate = f"{stem}-{number}"
    return candidate


def output_paths(prompts: list[str], output: Path, extension: str, count: int) -> list[list[Path]]:
    """Where each prompt's `count` images go.

    `output` with an ending is the file of the one image of one prompt (numbered when there are more); anything else
    is a folder for files named after their prompts.
    """
    single_file = bool(output.suffix) and len(prompts) == 1
    if single_file:
        return [[output] if count == 1 else [output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]]
    taken: set[str] = set()
    paths = []
    for prompt in prompts:
        stem = distinct(slug(prompt), taken)
        taken.add(stem)
        numbered = [stem] if count == 1 else [f"{stem}-{i + 1}" for i in range(count)]
        paths.append([output / f"{name}.{extension}" for name in numbered])
    return paths
