"""File names from prompts."""

import re
import unicodedata
from collections import Counter
from pathlib import Path

LONGEST = 60  # characters; file systems take 255 bytes, and a Chinese character is three
ENDINGS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}  # of file names, and their formats
MARKS = ("Mn", "Mc")  # Unicode's categories of vowel signs and accents, which belong to the letter before them


def slug(prompt: str) -> str:
    """The prompt as a file name: letters and digits of any script, the rest as single dashes."""
    text = unicodedata.normalize("NFKC", prompt).lower()
    kept = (c if c.isalnum() or unicodedata.category(c) in MARKS else "-" for c in text)
    return re.sub("-+", "-", "".join(kept))[:LONGEST].strip("-") or "image"


def is_file(output: Path) -> bool:
    """Whether images are to go to a file of this name rather than to a folder."""
    return bool(output.suffix) and not output.is_dir()


def output_paths(prompts: list[str], output: Path, extension: str, count: int) -> list[list[Path]]:
    """Where each prompt's `count` images go.

    `output` with an ending is the file for the image of one prompt (numbered if there are several); anything else is
    a folder for files named after their prompts, with a number if such a file already exists.

    Raises:
        ValueError: a file for several prompts, or with an ending that no image has.
    """
    if not is_file(output):
        taken: Counter[str] = Counter()
        given: set[Path] = set()
        return [_free(slug(prompt), output, extension, count, taken, given) for prompt in prompts]
    if output.suffix.lower() not in ENDINGS:
        raise ValueError(f"{output}: files end in {', '.join(ENDINGS)}; a folder with a dot has to be there already")
    if len(prompts) > 1:
        raise ValueError(f"{output}: a file takes one prompt, and there are {len(prompts)}; give a folder")
    return [_numbered(output, count)]


def _free(stem: str, folder: Path, extension: str, count: int, taken: Counter[str], given: set[Path]) -> list[Path]:
    """The first names that neither an earlier prompt nor an earlier run has taken.

    `taken`: how often each stem was used; `given`: all names of this run, as one prompt's may equal another's second.
    """
    while True:
        taken[stem] += 1
        name = stem if taken[stem] == 1 else f"{stem}-{taken[stem]}"
        paths = _numbered(folder / f"{name}.{extension}", count)
        if not any(path in given or path.exists() for path in paths):
            given.update(paths)
            return paths


def _numbered(path: Path, count: int) -> list[Path]:
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]
