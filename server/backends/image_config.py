"""What `config.pbtxt` means to an image model: its sizes, steps and devices, with the defaults for what is left out."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from export.spec import MIN_SIZE, SIZE_MULTIPLE
from server.backends.base import InstanceGroup, ModelFile
from server.config import ModelConfig, Size
from server.errors import ConfigError

MOST = 2**31 - 1  # of any number in config.pbtxt, as GetModel reports them
MAX_WORKERS = 256  # of a model on one machine
INSTANCE_KINDS = {"KIND_AUTO": "auto", "KIND_GPU": "cuda", "KIND_CPU": "cpu"}


def image_config(file: ModelFile) -> ModelConfig:
    """The settings of an image model.

    Raises:
        ConfigError: naming a parameter that there is not, or a value and what is accepted.
    """
    where = f"model {file.name!r}"
    values: dict[str, object] = {
        "name": file.name,
        "devices": _devices(file.groups, where),
        "queue": file.queue,
        "response_cache": file.response_cache,
    }
    if file.max_batch_size:
        values["max_batch_size"] = file.max_batch_size
    for key, text in file.parameters.items():
        if key not in PARAMETERS:
            raise ConfigError(f"{where}: unknown parameter {key!r}; {sorted(PARAMETERS)} are known")
        values[key] = PARAMETERS[key](text, f"{where}: parameter {key}")
    model = ModelConfig(**values)  # type: ignore[arg-type]
    # Only the name of a model_warmup sample counts: every batch size is run, with random inputs.
    more_sizes = (_size(name, f"{where}: model_warmup name") for name in file.warmup)
    return _checked(replace(model, warmup_sizes=(*model.warmup_sizes, *more_sizes)), where)


def _devices(groups: Iterable[InstanceGroup], where: str) -> tuple[str, ...]:
    """One device per worker process: `count` on each of a group's GPUs; "auto" is the server's --device."""
    devices: list[str] = []
    for group in groups:
        if group.kind not in INSTANCE_KINDS or (group.gpus and group.kind == "KIND_CPU"):
            raise ConfigError(
                f"{where}: instance_group of {group.kind} with gpus {list(group.gpus)} not supported; {INSTANCE_KINDS} "
                "are, and gpus only with the first two"
            )
        gpus = list(group.gpus) or (_visible_gpus() if group.kind == "KIND_GPU" else [])
        places = [f"cuda:{gpu}" for gpu in gpus] or [INSTANCE_KINDS[group.kind]]
        if len(devices) + len(places) * group.count > MAX_WORKERS:
            raise ConfigError(
                f"{where}: instance_group count {group.count} would make over {MAX_WORKERS} workers, each a process "
                "with the whole model; one a GPU is usual"
            )
        devices += places * group.count
    return tuple(devices) or ("auto",)


def _visible_gpus() -> list[int]:
    """The NVIDIA GPUs of this machine, without asking CUDA: the frontend does not load it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return list(range(len(visible.split(",")) if visible else 0))
    known = list(Path("/proc/driver/nvidia/gpus").glob("*"))
    # Some sandboxes have only the device files.
    return list(range(len(known or list(Path("/dev").glob("nvidia[0-9]*")))))


def _whole(text: str, where: str) -> int:
    if not (text.isdecimal() and text.isascii()) or not 1 <= int(text) <= MOST:
        raise ConfigError(f"{where}: {text!r} is not accepted; a whole number from 1 to {MOST} is")
    return int(text)


def _size(text: str, where: str) -> Size:
    match = re.fullmatch(r"([0-9]+)x([0-9]+)", text)
    if match is None:
        raise ConfigError(f"{where}: {text!r} is not WIDTHxHEIGHT")
    return int(match[1]), int(match[2])


def _sizes(text: str, where: str) -> tuple[Size, ...]:
    return tuple(_size(part.strip(), where) for part in text.split(",") if part.strip())


# Parameters of config.pbtxt, and how their text is read.
PARAMETERS: dict[str, Callable[[str, str], object]] = {
    "default_size": _size,
    "warmup_sizes": _sizes,
    "max_size": _whole,
    "min_size": _whole,
    "default_num_inference_steps": _whole,
    "max_num_inference_steps": _whole,
    "max_num_images": _whole,
    "prompt_cache_size": _whole,
}


def _checked(config: ModelConfig, where: str) -> ModelConfig:
    for width, height in (config.default_size, *config.warmup_sizes):
        for side in (width, height):
            if side % SIZE_MULTIPLE or not config.min_size <= side <= config.max_size:
                raise ConfigError(
                    f"{where}: size {width}x{height}; each side must be a multiple of {SIZE_MULTIPLE} from "
                    f"{config.min_size} to {config.max_size}"
                )
    if config.min_size < MIN_SIZE:
        raise ConfigError(f"{where}: min_size {config.min_size}; engines are exported from {MIN_SIZE} on")
    if config.default_num_inference_steps > config.max_num_inference_steps:
        raise ConfigError(
            f"{where}: default_num_inference_steps {config.default_num_inference_steps} is over "
            f"max_num_inference_steps ({config.max_num_inference_steps})"
        )
    wrong = [size for size in config.queue.preferred_batch_sizes if not 1 <= size <= config.max_batch_size]
    if wrong:
        raise ConfigError(
            f"{where}: preferred_batch_size {wrong[0]} is not accepted; 1 to max_batch_size "
            f"({config.max_batch_size}) is"
        )
    return config
