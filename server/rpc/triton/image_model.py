"""The image model as tensors: a prompt and scalars in, pixels or encoded images out.

Everything is put into the image service's own `GenerateRequest` and decoded by `convert`, so that both services accept
the same values and report the same errors for others.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from protos.zserve.v1 import image_generation_pb2 as pb
from server.backends.base import ModelFolder
from server.config import ModelConfig
from server.errors import ConfigError, InvalidRequestError
from server.requests import Completed, GenerationRequest, Image, ImageFormat, Preview, Progress
from server.rpc import convert
from server.tensors import (
    DataType,
    Delivery,
    InferRequest,
    InferResponse,
    ModelSpec,
    Parameter,
    Tensor,
    TensorSpec,
    join_strings,
)

INPUTS = (
    TensorSpec("PROMPT", DataType.BYTES, (1,)),
    TensorSpec("NEGATIVE_PROMPT", DataType.BYTES, (1,), optional=True),
    TensorSpec("WIDTH", DataType.INT32, (1,), optional=True),
    TensorSpec("HEIGHT", DataType.INT32, (1,), optional=True),
    TensorSpec("NUM_INFERENCE_STEPS", DataType.INT32, (1,), optional=True),
    TensorSpec("GUIDANCE_SCALE", DataType.FP32, (1,), optional=True),
    TensorSpec("SEED", DataType.INT64, (1,), optional=True),
    TensorSpec("NUM_IMAGES", DataType.INT32, (1,), optional=True),
    TensorSpec("IMAGE_FORMAT", DataType.BYTES, (1,), optional=True),
    TensorSpec("QUALITY", DataType.INT32, (1,), optional=True),
)
OUTPUTS = (TensorSpec("IMAGE", DataType.UINT8, (-1, -1, 3)), TensorSpec("SEED", DataType.INT64, (-1,)))  # one an image

# Request parameters: the scalar inputs under their names in lower case, and what only makes sense for a stream.
PROGRESS = "progress"
STREAM_PARAMETERS = (PROGRESS, "preview_interval")
OTHER_PARAMETERS = ("long_prompt", "sampler")
WHOLE = "a whole number above 0 is"
MAX_TEXT_BYTES = 4 * convert.MAX_PROMPT_CHARACTERS  # of UTF-8; longer text is not even decoded
FORMATS = {f.value: wire for f, wire in convert.WIRE_FORMATS.items()}
LONG_PROMPTS = {p.value: wire for p, wire in convert.WIRE_LONG_PROMPTS.items()}


@dataclass(frozen=True)
class WantedImages:
    """A generation request, and which responses its caller wants."""

    generation: GenerationRequest
    progress: bool  # also a response after every step and for every preview
    one_by_one: bool  # one response per image, as soon as it is finished


def model_spec(folder: ModelFolder) -> ModelSpec:
    """The signature of the image model. No batch dimension: one request is one prompt, the planner batches steps.

    Raises:
        ConfigError: its config declares another one.
    """
    file = folder.file
    if file.inputs not in ((), INPUTS) or file.outputs not in ((), OUTPUTS):
        raise ConfigError(
            f"model {file.name!r}: an image model has inputs and outputs of its own, which ModelConfig tells; leave "
            "them out of config.pbtxt, or as they are told"
        )
    return ModelSpec(file.name, folder.version, file.backend, INPUTS, OUTPUTS, decoupled=file.decoupled)


def decode_request(request: InferRequest, model: ModelConfig) -> WantedImages:
    """What is asked for.

    Raises:
        InvalidRequestError: naming the tensor or parameter, its value and what is accepted; or the caller's memory is
            too small for the images.
    """
    values = _values(request)
    progress = _truth(values.pop(PROGRESS, False))
    message = pb.GenerateRequest(model=model.name, request_id=request.id)
    message.priority = model.queue.level_of(request.priority)
    message.queue_timeout_microseconds = convert.microseconds(request.queue_timeout)
    for name, value in {"image_format": ImageFormat.RAW.value, **values}.items():
        _set(message, name, value)
    generation = convert.decode_request(message, model, request.timeout)
    progress = progress or generation.preview_interval > 0
    if progress and request.delivery is Delivery.ONE:
        raise InvalidRequestError("progress and preview_interval need ModelStreamInfer; ModelInfer has one response")
    wanted = WantedImages(generation, progress, one_by_one=progress or request.model.decoupled)
    _check_room(request, wanted)
    return wanted


def _check_room(request: InferRequest, wanted: WantedImages) -> None:
    """Nothing is drawn that has no place to go; the size of an encoded image is only known when there is one."""
    generation = wanted.generation
    images = 1 if wanted.one_by_one else generation.num_images
    request.check_room("SEED", images * DataType.INT64.size)
    if generation.image_format is ImageFormat.RAW:
        request.check_room("IMAGE", images * generation.height * generation.width * 3)


def encode_progress(event: Progress | Preview) -> InferResponse:
    """A step as a response: parameters alone, or a preview as JPEG in IMAGE."""
    if isinstance(event, Progress):
        return InferResponse((), {"event": "progress", **vars(event)}, final=False)
    image = Tensor("IMAGE", DataType.BYTES, (1,), join_strings([event.data]))
    return InferResponse((image,), {"event": "preview", "step": event.step, "image_index": event.image_index}, False)


def encode_image(image: Image, *, final: bool) -> InferResponse:
    """One finished image as a response of its own."""
    return InferResponse(_outputs([image]), {"event": "image", "image_index": image.index}, final)


def encode_images(images: list[Image], completed: Completed) -> InferResponse:
    """All images of a request in one response; timings and engines are its parameters."""
    fallbacks = {f"fallback_{e.component}": e.fallback_reason for e in completed.engines if e.fallback_reason}
    engines = {f"engine_{e.component}": str(e.backend) for e in completed.engines}
    return InferResponse(
        _outputs(sorted(images, key=lambda i: i.index)), {**vars(completed.timings), **engines, **fallbacks}
    )


def _outputs(images: list[Image]) -> tuple[Tensor, ...]:
    seeds = struct.pack(f"<{len(images)}q", *(i.seed for i in images))
    return _pixels(images), Tensor("SEED", DataType.INT64, (len(images),), seeds)


def _pixels(images: list[Image]) -> Tensor:
    first = images[0]
    if first.format is not ImageFormat.RAW:
        return Tensor("IMAGE", DataType.BYTES, (len(images),), join_strings(i.data for i in images))
    shape = (first.height, first.width, 3)
    if len(images) == 1:
        return Tensor("IMAGE", DataType.UINT8, shape, first.data)
    return Tensor("IMAGE", DataType.UINT8, (len(images), *shape), b"".join(i.data for i in images))


def _values(request: InferRequest) -> dict[str, Parameter]:
    """Tensors and parameters together, all under lower-case names."""
    parameters = {name.lower(): value for name, value in request.parameters.items()}
    known = {t.name.lower() for t in INPUTS} | {*STREAM_PARAMETERS, *OTHER_PARAMETERS}
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise InvalidRequestError(
            f"unknown request parameter {unknown[0][:64]!r}; {', '.join(sorted(known - {'prompt'}))} are known, and "
            "PROMPT is an input"
        )
    tensors = {name.lower(): _scalar(tensor) for name, tensor in request.inputs.items()}
    if twice := sorted(parameters.keys() & tensors.keys()):
        raise InvalidRequestError(f"{twice[0]}: given as an input and as a parameter; one of them is accepted")
    return parameters | tensors


def _scalar(tensor: Tensor) -> Parameter:
    match tensor.datatype:
        case DataType.BYTES:
            return _text(tensor)
        case DataType.INT32:
            (whole,) = struct.unpack("<i", tensor.data)
            return int(whole)
        case DataType.INT64:
            (whole,) = struct.unpack("<q", tensor.data)
            return int(whole)
        case _:
            (number,) = struct.unpack("<f", tensor.data)
            return float(number)


def _text(tensor: Tensor) -> str:
    (data,) = tensor.strings()
    if len(data) > MAX_TEXT_BYTES:
        accepted = f"{convert.MAX_PROMPT_CHARACTERS} characters at most are, this has {len(data)} bytes"
        raise InvalidRequestError.of(tensor.name.lower(), data[:32].decode("utf-8", "replace") + "...", accepted)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{tensor.name.lower()}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _truth(value: Parameter) -> bool:
    if isinstance(value, str) and value.lower() not in ("true", "false"):
        raise InvalidRequestError.of(PROGRESS, value, "true or false is")
    return value.lower() == "true" if isinstance(value, str) else bool(value)


def _set(message: pb.GenerateRequest, name: str, value: Parameter) -> None:
    """Sets a field of the message from whatever kind of parameter it came as."""
    try:
        setattr(message, name, _READERS.get(name, _whole)(value))
    except (ValueError, TypeError, OverflowError):
        raise InvalidRequestError.of(name, value, _ACCEPTED.get(name, WHOLE)) from None


def _whole(value: Parameter) -> int:
    """A whole number, or the text of one; a fraction is refused, not rounded."""
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    return int(value)


def _one_of(known: Mapping[str, Any]) -> Callable[[Parameter], Any]:
    def read(value: Parameter) -> Any:
        if str(value).lower() not in known:
            raise ValueError(value)
        return known[str(value).lower()]

    return read


def _listed(known: Iterable[str]) -> str:
    return f"one of {', '.join(known)} is"


_READERS: dict[str, Callable[[Any], Any]] = {
    "prompt": str,
    "negative_prompt": str,
    "sampler": str,
    "guidance_scale": float,
    "image_format": _one_of(FORMATS),
    "long_prompt": _one_of(LONG_PROMPTS),
}
_ACCEPTED = {
    "seed": f"a whole number from 0 to {convert.MAX_SEED} is",
    "guidance_scale": "a number is",
    "image_format": _listed(FORMATS),
    "long_prompt": _listed(LONG_PROMPTS),
}
