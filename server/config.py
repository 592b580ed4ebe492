"""Configuration, resolved once at the edge: the server's options and each model's `config.pbtxt`."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from export.spec import MIN_SIZE, SIZE_MULTIPLE
from server.errors import ConfigError
from server.queue_policy import QueuePolicy, read_queue_policy
from server.settings import GrpcConfig, LogSettings, MetricsConfig, TelemetryConfig, TraceSettings

Size = tuple[int, int]  # width, height


class FallbackPolicy(StrEnum):
    """What to do when an engine cannot be loaded."""

    EAGER = "eager"
    REFUSE = "refuse"


class ControlMode(StrEnum):
    """When models are loaded and unloaded, in Triton's words."""

    NONE = "none"  # all of them, once, at the start
    POLL = "poll"  # whenever the repository has changed
    EXPLICIT = "explicit"  # when a client asks for it


@dataclass(frozen=True)
class ServeConfig:
    """The options of `zserve serve`; those with Triton's meaning have its names and defaults."""

    model_repository: Path
    grpc: GrpcConfig = field(default_factory=GrpcConfig)
    allow_metrics: bool = True
    metrics_address: str = "0.0.0.0"
    metrics_port: int = 8002
    allow_gpu_metrics: bool = True
    allow_cpu_metrics: bool = True
    metrics_interval_ms: int = 2000  # between two readings of the GPU and CPU metrics
    exit_timeout_secs: float = 30.0
    fallback: FallbackPolicy = FallbackPolicy.EAGER
    device: str = "auto"
    max_retries: int = 3
    worker_timeout_secs: float = 60.0
    worker_start_timeout_secs: float = 1800.0
    response_cache_byte_size: int = 256 << 20
    id: str = "triton"  # the server's name in its metadata; Triton clients may check for exactly this
    model_control_mode: ControlMode = ControlMode.NONE
    load_model: tuple[str, ...] = ()  # with explicit control: what is loaded at the start; * for all
    repository_poll_secs: float = 15.0
    strict_readiness: bool = True  # ready only while every model is
    exit_on_error: bool = False  # end when a model cannot be loaded at the start
    allow_client_shm: bool = False
    log: LogSettings = field(default_factory=LogSettings)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    trace: TraceSettings = field(default_factory=TraceSettings)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)


@dataclass(frozen=True)
class ModelConfig:
    """What a model's `config.pbtxt` says, with the defaults for what it leaves out. Sizes in pixels."""

    name: str
    default_size: Size = (1024, 1024)
    warmup_sizes: tuple[Size, ...] = ()
    min_size: int = MIN_SIZE
    max_size: int = 2048
    default_num_inference_steps: int = 8
    max_num_inference_steps: int = 50
    max_num_images: int = 4
    max_batch_size: int = 4
    queue: QueuePolicy = field(default_factory=QueuePolicy)
    devices: tuple[str, ...] = ("auto",)  # one per worker process
    response_cache: bool = False
    prompt_cache_size: int = 256  # encoded prompts a worker keeps


SUPPORTED_FIELDS = {
    "name",
    "backend",
    "max_batch_size",
    "input",  # and output: the model's own, as ModelConfig reports them (`server.rpc.triton.image_model.model_spec`)
    "output",
    "instance_group",
    "parameters",
    "dynamic_batching",
    "version_policy",
    "model_transaction_policy",
    "model_warmup",
    "response_cache",
}
MOST = 2**31 - 1  # of any number in config.pbtxt, as GetModel reports them
MAX_WORKERS = 256  # of a model on one machine
INSTANCE_KINDS = {"KIND_AUTO": "auto", "KIND_GPU": "cuda", "KIND_CPU": "cpu"}


def read_model_config(folder: Path) -> ModelConfig:
    """Reads `folder`/config.pbtxt, Triton's ModelConfig in protobuf text format.

    Raises:
        ConfigError: it is missing, does not parse, or sets something this server does not serve.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    path = folder / "config.pbtxt"
    try:
        config = text_format.Parse(path.read_text("utf-8"), pb.ModelConfig())
    except (OSError, text_format.ParseError, UnicodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    unsupported = {field.name for field, _ in config.ListFields()} - SUPPORTED_FIELDS
    if unsupported:
        raise ConfigError(f"{path}: {sorted(unsupported)} not supported; {sorted(SUPPORTED_FIELDS)} are")
    if config.name not in ("", folder.name):
        raise ConfigError(f"{path}: name {config.name!r} differs from its folder's; make them equal or leave it out")
    values: dict[str, object] = {
        "name": folder.name,
        "devices": _devices(config.instance_group, path),
        "queue": read_queue_policy(config.dynamic_batching, str(path)),
        "response_cache": config.response_cache.enable,
    }
    if config.max_batch_size:
        values["max_batch_size"] = config.max_batch_size
    for key, parameter in config.parameters.items():
        if key not in PARAMETERS:
            raise ConfigError(f"{path}: unknown parameter {key!r}; {sorted(PARAMETERS)} are known")
        values[key] = PARAMETERS[key](parameter.string_value, f"{path}: parameter {key}")
    model = ModelConfig(**values)  # type: ignore[arg-type]
    more_sizes = _warmup_sizes(config.model_warmup, path)
    return _checked(replace(model, warmup_sizes=(*model.warmup_sizes, *more_sizes)), path)


def _devices(groups: Iterable[Any], path: Path) -> tuple[str, ...]:
    """One device per worker process: `count` on each of a group's GPUs; "auto" is the server's --device."""
    devices: list[str] = []
    for group in groups:
        kind = group.Kind.Name(group.kind)
        if kind not in INSTANCE_KINDS or (group.gpus and kind == "KIND_CPU"):
            raise ConfigError(
                f"{path}: instance_group of {kind} with gpus {list(group.gpus)} not supported; {INSTANCE_KINDS} are, "
                "and gpus only with the first two"
            )
        gpus = list(group.gpus) or (_visible_gpus() if kind == "KIND_GPU" else [])
        places, count = [f"cuda:{gpu}" for gpu in gpus] or [INSTANCE_KINDS[kind]], group.count or 1
        if len(devices) + len(places) * count > MAX_WORKERS:
            raise ConfigError(
                f"{path}: instance_group count {count} would make over {MAX_WORKERS} workers, each a process with the "
                "whole model; one a GPU is usual"
            )
        devices += places * count
    return tuple(devices) or ("auto",)


def _visible_gpus() -> list[int]:
    """The NVIDIA GPUs of this machine, without asking CUDA: the frontend does not load it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return list(range(len(visible.split(",")) if visible else 0))
    known = list(Path("/proc/driver/nvidia/gpus").glob("*"))
    # Some sandboxes have only the device files.
    return list(range(len(known or list(Path("/dev").glob("nvidia[0-9]*")))))


def _warmup_sizes(samples: Iterable[Any], path: Path) -> tuple[Size, ...]:
    """Only the name of a model_warmup sample counts, WIDTHxHEIGHT: every batch size is run, with random inputs."""
    for sample in samples:
        if sample.inputs:
            raise ConfigError(f"{path}: model_warmup inputs not supported; name the sample WIDTHxHEIGHT and give none")
    return tuple(_size(sample.name, f"{path}: model_warmup name") for sample in samples)


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


def _checked(config: ModelConfig, path: Path) -> ModelConfig:
    for width, height in (config.default_size, *config.warmup_sizes):
        for side in (width, height):
            if side % SIZE_MULTIPLE or not config.min_size <= side <= config.max_size:
                raise ConfigError(
                    f"{path}: size {width}x{height}; each side must be a multiple of {SIZE_MULTIPLE} from "
                    f"{config.min_size} to {config.max_size}"
                )
    if config.min_size < MIN_SIZE:
        raise ConfigError(f"{path}: min_size {config.min_size}; engines are exported from {MIN_SIZE} on")
    if config.default_num_inference_steps > config.max_num_inference_steps:
        raise ConfigError(
            f"{path}: default_num_inference_steps {config.default_num_inference_steps} is over max_num_inference_steps "
            f"({config.max_num_inference_steps})"
        )
    wrong = [size for size in config.queue.preferred_batch_sizes if not 1 <= size <= config.max_batch_size]
    if wrong:
        raise ConfigError(
            f"{path}: preferred_batch_size {wrong[0]} is not accepted; 1 to max_batch_size ({config.max_batch_size}) is"
        )
    return config


def cpu_threads(instances: int) -> int:
    """Threads an instance gets when `instances` share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, instances))
