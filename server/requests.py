"""What passes through the server: one request, and the events that answer it. No wire types, no torch."""

from dataclasses import dataclass
from enum import Enum, StrEnum

from export.manifest import Backend
from export.spec import Component


class ImageFormat(StrEnum):
    """How an image's bytes are encoded; `raw` is 8-bit RGB, rows from the top."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    RAW = "raw"


class LongPrompt(Enum):
    """What to do with a prompt past the encoder's 512 tokens."""

    REFUSE = "refuse"
    TRUNCATE = "truncate"


@dataclass(frozen=True)
class GenerationRequest:
    """A valid request with every default filled in. Sizes in pixels."""

    request_id: str
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    num_images: int
    image_format: ImageFormat
    quality: int
    preview_interval: int
    priority: int  # 1 is the highest
    long_prompt: LongPrompt
    timeout: float | None  # seconds left when it was decoded
    queue_timeout: float | None = None  # seconds within which a worker must take it; None for the model's policy
    waited: float = 0.0  # seconds in the frontend's queue, which count in the worker's ordering too
    delayed: bool = False  # its queue timeout passed there, which put it behind all others of its level

    @property
    def guided(self) -> bool:
        """Whether every step also runs the negative prompt."""
        return self.guidance_scale > 0

    @property
    def forwards(self) -> int:
        """Rows of the denoiser that the whole request needs."""
        return self.num_inference_steps * self.num_images * (2 if self.guided else 1)


@dataclass(frozen=True)
class EngineUse:
    """Which engine serves a component, and why it is not the one asked for, if it is not."""

    component: Component
    backend: Backend
    fallback_reason: str = ""


@dataclass(frozen=True)
class Timings:
    """Milliseconds spent by one request; stages follow each other."""

    queue_ms: float = 0.0
    encode_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    image_encode_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True)
class Queued:
    """The request waits behind `position` others, and should start `estimated_start_ms` from now."""

    position: int
    estimated_start_ms: float | None = None


@dataclass(frozen=True)
class Started:
    """A worker has started the request."""

    instance: str
    attempt: int = 1


@dataclass(frozen=True)
class Progress:
    """Step `step` of `of` of one image is done; `batch_size` images shared it, this one at `batch_index`."""

    step: int
    of: int
    image_index: int
    step_ms: float = 0.0
    batch_size: int = 1
    batch_index: int = 0


@dataclass(frozen=True)
class Preview:
    """The image as predicted after `step`, a JPEG with one pixel for every 8x8 of the image."""

    step: int
    image_index: int
    data: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Image:
    """A finished image."""

    index: int
    seed: int
    width: int
    height: int
    format: ImageFormat
    data: bytes
    decode_ms: float = 0.0
    image_encode_ms: float = 0.0


@dataclass(frozen=True)
class Completed:
    """The last event of every request that succeeded."""

    timings: Timings
    engines: tuple[EngineUse, ...]
    prompt_cached: bool
    denoiser_forwards: int
    response_cached: bool = False


Event = Queued | Started | Progress | Preview | Image | Completed


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by stage; device bytes are 0 on the CPU."""

    host_before_load: int = 0
    host_loaded: int = 0
    host_peak: int = 0
    device_before_load: int = 0
    device_loaded: int = 0
    device_peak: int = 0


@dataclass(frozen=True)
class StepCost:
    """Seconds of one forward of `rows` rows at a size in pixels; the prompt encoder's is 0 x 0."""

    height: int
    width: int
    rows: int
    seconds: float
    component: Component = Component.DENOISER


@dataclass(frozen=True)
class InstanceInfo:
    """One worker process: its device, engines, memory and measured costs."""

    name: str
    device: str
    version: str
    precision: str
    engines: tuple[EngineUse, ...]
    memory: MemoryUse
    step_costs: tuple[StepCost, ...]
