"""Pure functions between wire messages and the server's own types. Requests are validated here, once."""

import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from export.manifest import Backend
from export.spec import SIZE_MULTIPLE, Component
from protos.zserve.v1 import image_generation_pb2 as pb
from server.config import ModelConfig
from server.errors import InvalidRequestError
from server.requests import (
    Completed,
    EngineUse,
    Event,
    GenerationRequest,
    Image,
    ImageFormat,
    LongPrompt,
    Preview,
    Progress,
    Queued,
    Started,
    Timings,
)

MAX_SEED = 2**63 - 1
MAX_REQUEST_ID = 128
DEFAULT_GUIDANCE_SCALE = 0.0  # none: the model is distilled to do without
MAX_GUIDANCE_SCALE = 20.0
MAX_PROMPT_CHARACTERS = 32_768  # far past 512 tokens; keeps a hostile prompt out of the tokenizer
T = TypeVar("T")

FORMATS: dict[int, ImageFormat] = {
    pb.IMAGE_FORMAT_UNSPECIFIED: ImageFormat.PNG,
    pb.IMAGE_FORMAT_PNG: ImageFormat.PNG,
    pb.IMAGE_FORMAT_JPEG: ImageFormat.JPEG,
    pb.IMAGE_FORMAT_WEBP: ImageFormat.WEBP,
    pb.IMAGE_FORMAT_RAW: ImageFormat.RAW,
}
WIRE_FORMATS: dict[ImageFormat, Any] = {ours: wire for wire, ours in FORMATS.items()}
LONG_PROMPTS: dict[int, LongPrompt] = {
    pb.LONG_PROMPT_UNSPECIFIED: LongPrompt.REFUSE,
    pb.LONG_PROMPT_REFUSE: LongPrompt.REFUSE,
    pb.LONG_PROMPT_TRUNCATE: LongPrompt.TRUNCATE,
}
WIRE_LONG_PROMPTS: dict[LongPrompt, Any] = {ours: wire for wire, ours in LONG_PROMPTS.items()}


def decode_request(message: pb.GenerateRequest, model: ModelConfig, timeout: float | None) -> GenerationRequest:
    """The request with every default filled in; `timeout` is the call's time left in seconds.

    Raises:
        InvalidRequestError: naming the field, its value and what is accepted.
    """
    _check_sampler(message.sampler)
    width, height = model.default_size
    return GenerationRequest(
        request_id=_request_id(message.request_id),
        model=model.name,
        prompt=_prompt("prompt", message.prompt, allow_empty=False),
        negative_prompt=_prompt("negative_prompt", message.negative_prompt, allow_empty=True),
        width=_size("width", message.width if message.HasField("width") else width, model),
        height=_size("height", message.height if message.HasField("height") else height, model),
        num_inference_steps=_steps(message, model),
        guidance_scale=_guidance(message),
        seed=_seed(message),
        num_images=_whole("num_images", _field(message, "num_images", 1), 1, model.max_num_images),
        image_format=_enum("image_format", message.image_format, FORMATS, "PNG, JPEG, WEBP and RAW are"),
        quality=_whole("quality", _field(message, "quality", 90), 1, 100),
        preview_interval=_whole("preview_interval", message.preview_interval, 0, model.max_num_inference_steps),
        priority=_whole("priority", message.priority or model.queue.default_level, 1, model.queue.levels),
        long_prompt=_enum("long_prompt", message.long_prompt, LONG_PROMPTS, "REFUSE and TRUNCATE are"),
        timeout=timeout,
        queue_timeout=message.queue_timeout_microseconds / 1e6 or None,
    )


def encode_request(request: GenerationRequest) -> pb.GenerateRequest:
    """The message that decodes to `request`."""
    return pb.GenerateRequest(
        model=request.model,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        seed=request.seed,
        num_images=request.num_images,
        image_format=WIRE_FORMATS[request.image_format],
        quality=request.quality,
        preview_interval=request.preview_interval,
        priority=request.priority,
        request_id=request.request_id,
        long_prompt=WIRE_LONG_PROMPTS[request.long_prompt],
        queue_timeout_microseconds=microseconds(request.queue_timeout),
    )


def microseconds(seconds: float | None) -> int:
    """`seconds` as in the message; 0 for None. Rounding must not exceed what the field holds."""
    return min(round(1e6 * (seconds or 0)), 2**64 - 1)


def _field(message: pb.GenerateRequest, name: str, default: int) -> int:
    return getattr(message, name) if message.HasField(name) else default  # type: ignore[arg-type]


def _request_id(text: str) -> str:
    if len(text) > MAX_REQUEST_ID or not text.isprintable():
        raise InvalidRequestError.of(
            "request_id",
            text[:32],
            f"up to {MAX_REQUEST_ID} printable characters are, or none for one to be made up",
        )
    return text or secrets.token_hex(8)


def _prompt(field: str, text: str, *, allow_empty: bool) -> str:
    if not allow_empty and not text.strip():
        raise InvalidRequestError.of(field, text, "a description of the image is")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequestError.of(
            field, f"{text[:32]}...", f"{MAX_PROMPT_CHARACTERS} characters at most are, this has {len(text)}"
        )
    return text


def _size(field: str, value: int, model: ModelConfig) -> int:
    if value % SIZE_MULTIPLE or not model.min_size <= value <= model.max_size:
        accepted = f"a multiple of {SIZE_MULTIPLE} from {model.min_size} to {model.max_size} is"
        raise InvalidRequestError.of(field, value, accepted)
    return value


def _whole(field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidRequestError.of(field, value, f"a whole number from {low} to {high} is")
    return value


def _steps(message: pb.GenerateRequest, model: ModelConfig) -> int:
    value = _field(message, "num_inference_steps", model.default_num_inference_steps)
    return _whole("num_inference_steps", value, 1, model.max_num_inference_steps)


def _guidance(message: pb.GenerateRequest) -> float:
    value = message.guidance_scale if message.HasField("guidance_scale") else DEFAULT_GUIDANCE_SCALE
    if not (math.isfinite(value) and 0 <= value <= MAX_GUIDANCE_SCALE):
        raise InvalidRequestError.of("guidance_scale", value, f"a number from 0 to {MAX_GUIDANCE_SCALE:g} is")
    return value


def _seed(message: pb.GenerateRequest) -> int:
    value = message.seed if message.HasField("seed") else secrets.randbits(32)
    last = value + max(1, message.num_images) - 1
    if last > MAX_SEED:
        raise InvalidRequestError.of("seed", value, f"0 to {MAX_SEED} are, also with num_images - 1 added")
    return value


def _enum(field: str, value: int, known: Mapping[int, T], accepted: str) -> T:
    if value not in known:
        raise InvalidRequestError.of(field, value, accepted)
    return known[value]


def _check_sampler(name: str) -> None:
    if name not in ("", "euler"):
        raise InvalidRequestError.of(
            "sampler",
            name,
            '"euler" is: Z-Image-Turbo is distilled for the Euler flow-match schedule and has no other',
        )


def encode_event(event: Event, request_id: str) -> pb.GenerateEvent:
    """The wire form of `event`."""
    kind, encode = _ENCODERS[type(event)]
    return pb.GenerateEvent(request_id=request_id, **{kind: encode(event)})


def decode_event(message: pb.GenerateEvent) -> Event | None:
    """The inverse of `encode_event`; None for a kind of event that a newer peer knows and we do not."""
    kind = message.WhichOneof("event")
    return None if kind is None else _DECODERS[kind](getattr(message, kind))


def image_fields(image: Image) -> dict[str, Any]:
    """The fields of an image's wire form. Not a message: nesting one in another would copy the pixels twice."""
    return {**vars(image), "format": WIRE_FORMATS[image.format]}


def encode_completed(event: Completed) -> pb.Completed:
    """The wire form of the last event."""
    return pb.Completed(
        timings=pb.Timings(**vars(event.timings)),
        engines=[encode_engine_use(e) for e in event.engines],
        prompt_cached=event.prompt_cached,
        denoiser_forwards=event.denoiser_forwards,
        response_cached=event.response_cached,
    )


def _decode_completed(message: pb.Completed) -> Completed:
    timings = {field.name: getattr(message.timings, field.name) for field in pb.Timings.DESCRIPTOR.fields}
    return Completed(
        Timings(**timings),
        tuple(decode_engine_use(e) for e in message.engines),
        message.prompt_cached,
        message.denoiser_forwards,
        message.response_cached,
    )


_ENCODERS: dict[type, tuple[str, Callable[..., Any]]] = {
    Queued: ("queued", vars),
    Started: ("started", vars),
    Progress: ("progress", vars),
    Preview: ("preview", vars),
    Image: ("image", image_fields),
    Completed: ("completed", encode_completed),
}
_DECODERS: dict[str, Callable[..., Event]] = {
    "queued": lambda m: Queued(m.position, m.estimated_start_ms if m.HasField("estimated_start_ms") else None),
    "started": lambda m: Started(m.instance, m.attempt),
    "progress": lambda m: Progress(m.step, m.of, m.image_index, m.step_ms, m.batch_size, m.batch_index),
    "preview": lambda m: Preview(m.step, m.image_index, m.data, m.width, m.height),
    "image": lambda m: Image(
        m.index, m.seed, m.width, m.height, FORMATS[m.format], m.data, m.decode_ms, m.image_encode_ms
    ),
    "completed": _decode_completed,
}


def encode_engine_use(use: EngineUse) -> pb.EngineUse:
    """The wire form of an engine in use."""
    return pb.EngineUse(component=use.component, backend=use.backend, fallback_reason=use.fallback_reason)


def decode_engine_use(message: pb.EngineUse) -> EngineUse:
    """The inverse of `encode_engine_use`."""
    return EngineUse(Component(message.component), Backend(message.backend), message.fallback_reason)
