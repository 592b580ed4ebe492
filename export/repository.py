"""Writing versions into a model repository in Triton's layout. A reader never sees half a version."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from export.errors import VersionExistsError
from export.files import write_whole
from export.spec import pixels

# Parameters in config.pbtxt that come from the command line.
EXPORTED_PARAMETERS = ("default_size", "warmup_sizes", "max_size")


@dataclass(frozen=True)
class ServingDefaults:
    """What a new `config.pbtxt` says about serving. Sizes in pixels, as "WIDTHxHEIGHT"."""

    default_size: str = "1024x1024"
    warmup_sizes: tuple[str, ...] = ()  # besides the default size
    num_inference_steps: int = 8
    max_batch: int = 4
    max_size: int = 2048

    @property
    def default_pixels(self) -> tuple[int, int]:
        """Width and height of the default size."""
        return pixels(self.default_size)


def versions(model: Path) -> list[int]:
    """The version numbers under `model`, ascending."""
    return sorted(int(p.name) for p in _numbered(model) if p.is_dir())


def _numbered(model: Path) -> list[Path]:
    """All that has a version's name under `model`; a link whose disk is not mounted is no version now."""
    return [p for p in model.iterdir() if p.name.isdecimal()] if model.is_dir() else []


class Existing(Enum):
    """What to do about engines and a version that are already there."""

    KEEP = "keep"
    REPLACE = "replace"


# Where a version is built. A forced export resumes only from forced work; other leftovers may predate --force.
INCOMPLETE = {Existing.KEEP: ".incomplete", Existing.REPLACE: ".incomplete-forced"}
REPLACED = ".replaced-"  # prefix of a version moved aside until its replacement is in place


def free_version(model: Path, number: int | None, existing: Existing) -> Path:
    """The folder that version `number` (None: the next) is published as.

    Raises:
        VersionExistsError: it is there, and to be kept.
    """
    target = model / str(number or max((int(p.name) for p in _numbered(model)), default=0) + 1)
    if os.path.lexists(target) and existing is Existing.KEEP:
        raise VersionExistsError(
            f"{target} is already there; --force replaces it, and without --version the next number is taken"
        )
    return target


@contextmanager
def locked(model: Path) -> Iterator[None]:
    """Keeps other exports out of the model's folder, which is made if there is none.

    Raises:
        VersionExistsError: another export of this model is running.
    """
    model.mkdir(parents=True, exist_ok=True)
    with (model / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VersionExistsError(f"another export into {model} is running; wait for it to end") from None
        _settle_replaced(model)
        yield


@contextmanager
def new_version(
    model: Path, number: int | None = None, existing: Existing = Existing.KEEP
) -> Iterator[tuple[Path, Path]]:
    """A folder to build in, and the one that it becomes when the block ends well: version `number` (None: the next).

    When it does not, the folder stays for the next export of the same kind to go on from; no reader looks into it. It
    may hold anything when it is yielded. The model has to be `locked`.

    Raises:
        VersionExistsError: the version is there and to be kept, before or after the block.
        OSError: it could not be replaced.
    """
    folder, target = model / INCOMPLETE[existing], free_version(model, number, existing)
    if os.path.lexists(replaced := _replaced(target)):
        remove(replaced)  # raises now, not after the build, if what was replaced before cannot be deleted
    for other in set(INCOMPLETE.values()) - {folder.name}:
        shutil.rmtree(model / other, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    yield folder, target
    _publish(folder, free_version(model, int(target.name), existing))  # again: one may have been copied there meanwhile


def _publish(folder: Path, target: Path) -> None:
    if os.path.lexists(target):
        target.rename(_replaced(target))
    folder.rename(target)
    _settle_replaced(target.parent)


def _replaced(target: Path) -> Path:
    """Where a version is put that another replaces."""
    return target.with_name(f"{REPLACED}{target.name}")


def _settle_replaced(model: Path) -> None:
    """Deletes versions that were replaced; restores one whose replacement was never published."""
    for replaced in model.glob(f"{REPLACED}*"):
        version = model / replaced.name.removeprefix(REPLACED)
        if not os.path.lexists(version):
            replaced.rename(version)
            continue
        with suppress(OSError):  # the next export tries again
            remove(replaced)


def remove(path: Path) -> None:
    """Deletes a file, a folder with all that is in it, or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def take(files: Iterable[Path], folder: Path) -> None:
    """Puts `files` of another version into `folder`, without a second copy where the file system can."""
    for file in files:
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copy2(file, folder)


def write_config(model: Path, defaults: ServingDefaults) -> None:
    """Writes `config.pbtxt` unless there is one: an existing one is the operator's."""
    path = model / "config.pbtxt"
    if path.exists():
        return
    write_whole(path, _config_text(model.name, defaults).encode())


def kept_settings(model: Path, defaults: ServingDefaults) -> tuple[str, ...]:
    """Where `config.pbtxt` says something else than an export with `defaults` would write, a phrase each."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    def settings(text: str) -> dict[str, str]:
        config = text_format.Parse(text, pb.ModelConfig())
        values = {key: config.parameters[key].string_value for key in EXPORTED_PARAMETERS if key in config.parameters}
        return {"max_batch_size": str(config.max_batch_size or ""), **values}

    try:
        there = settings((model / "config.pbtxt").read_text("utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeError, text_format.ParseError) as error:
        return (f"it cannot be read ({error})",)
    ours = settings(_config_text(model.name, defaults))
    return tuple(
        f"{key} is {there.get(key) or 'not set'}, and {value} was asked for"
        for key, value in ours.items()
        if there.get(key) != value
    )


def _config_text(name: str, defaults: ServingDefaults) -> str:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(name=name, backend="z_image", max_batch_size=defaults.max_batch)
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_AUTO)
    parameters = {
        "default_size": defaults.default_size,
        "warmup_sizes": ",".join(dict.fromkeys((defaults.default_size, *defaults.warmup_sizes))),
        "default_num_inference_steps": str(defaults.num_inference_steps),
        "max_size": str(defaults.max_size),
    }
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return text_format.MessageToString(config)
