"""Files that a reader never sees half written."""

from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes `path` whole or not at all: to a draft beside it, which then takes its place."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_bytes(data)
    draft.replace(path)
