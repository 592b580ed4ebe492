"""Where the engines of a benchmark come from: an existing version, or one that `zserve export` makes."""

import subprocess
import sys
from pathlib import Path

from benchmarks.choice import Choice, backend_of
from benchmarks.record import BenchmarkError
from export.checkpoint import open_checkpoint
from export.manifest import CheckpointRecord, Manifest
from export.repository import versions


def version_folder(choice: Choice, row: str) -> Path:
    """The version to measure in `row`: the one given with --model, or one that `zserve export` makes or finds valid.

    Raises:
        BenchmarkError: the export failed.
    """
    if row in choice.models:
        return choice.models[row]
    name = f"{choice.checkpoint.name}-{row}-{choice.sizes[0]}"
    settings = {
        "checkpoint": choice.checkpoint,
        "repository": choice.repository,
        "name": name,
        "backend": backend_of(row),
        "precision": choice.precision_of(row),
        "device": choice.device,
        "default-size": choice.sizes[0],
        "max-batch": choice.max_batch,
        "max-size": choice.max_size,
    }
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    print(f"exporting {name} ...", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-P", "-m", "zserve", "export", *options], stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{row} cannot be measured: its export failed, for the reason above")
    return choice.repository / name / str(versions(choice.repository / name)[-1])


def checked_version(choice: Choice, row: str) -> tuple[Path, Manifest]:
    """The version to measure in `row`, and its manifest.

    Raises:
        BenchmarkError: the export failed, or the version is of another checkpoint or precision than the row.
    """
    folder, precision = version_folder(choice, row), choice.precision_of(row)
    manifest, expected = Manifest.read(folder), CheckpointRecord.of(open_checkpoint(choice.checkpoint))
    if (manifest.checkpoint.fingerprint, manifest.precision) != (expected.fingerprint, precision):
        raise BenchmarkError(
            f"{folder} is {manifest.precision} from {manifest.checkpoint.path}, and is to be measured as {precision} "
            f"from {expected.path}: give the --checkpoint that it was exported from, and a --device of its precision"
        )
    return folder, manifest
