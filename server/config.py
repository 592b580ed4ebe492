"""Configuration, resolved once at the edge: the server's options and each image model's settings."""

import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from export.spec import MIN_SIZE
from server.queue_policy import QueuePolicy
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
    """What an image model's `config.pbtxt` says, with the defaults for what it leaves out. Sizes in pixels."""

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


def cpu_threads(instances: int) -> int:
    """Threads an instance gets when `instances` share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, instances))
