"""What a client sends and receives, and the wire forms. Shared by both clients."""

import io
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
from google.rpc import error_details_pb2, status_pb2

from protos.zserve.v1 import image_generation_pb2 as pb

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

FORMATS = {
    "png": pb.IMAGE_FORMAT_PNG,
    "jpeg": pb.IMAGE_FORMAT_JPEG,
    "webp": pb.IMAGE_FORMAT_WEBP,
    "raw": pb.IMAGE_FORMAT_RAW,
}
FORMAT_NAMES = {number: name for name, number in FORMATS.items()}
STATUS_DETAILS = "grpc-status-details-bin"  # where gRPC keeps google.rpc.Status
UINT32, INT63 = 2**32 - 1, 2**63 - 1


class GenerationFailedError(Exception):
    """The call failed: refused by the server, cancelled, or never sent.

    Attributes:
        code: the gRPC status, for example INVALID_ARGUMENT for a value the model does not accept.
        details: what was wrong, what is accepted and what to do, in the server's words.
        retry_after: seconds after which trying again may help, where the server says so (google.rpc.RetryInfo).
    """

    def __init__(self, code: grpc.StatusCode, details: str, retry_after: float | None = None) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.details, self.retry_after = code, details, retry_after

    @classmethod
    def of(cls, error: Any) -> Self:
        """From the error of a gRPC call."""
        return cls(error.code(), error.details() or "", _retry_after(error.trailing_metadata() or ()))


def _retry_after(trailing_metadata: Iterable[tuple[str, Any]]) -> float | None:
    advice = error_details_pb2.RetryInfo()
    for key, value in trailing_metadata:
        if key == STATUS_DETAILS and any(d.Unpack(advice) for d in status_pb2.Status.FromString(value).details):
            return float(advice.retry_delay.ToMilliseconds() / 1e3)
    return None


@dataclass(frozen=True)
class ImageRequest:
    """One request. None leaves a value to the model's defaults; sizes are in pixels, multiples of 16."""

    prompt: str
    model: str = ""  # may be empty if the server has one model
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None  # drawn by the server when None
    num_images: int = 1
    image_format: str = "png"  # png, jpeg, webp or raw
    quality: int = 90  # of jpeg and webp
    preview_interval: int = 0  # a preview every this many steps; 0: none
    priority: int = 0  # 1 is the highest; 0 is the model's default
    request_id: str = ""
    truncate: bool = False  # cut a prompt past 512 tokens instead of being refused

    def to_message(self) -> pb.GenerateRequest:
        """The wire form.

        Raises:
            ValueError: a value that the wire form cannot carry, such as a negative seed or an unknown format.
        """
        self._check()
        optional = {
            name: getattr(self, name)
            for name in ("width", "height", "num_inference_steps", "guidance_scale", "seed")
            if getattr(self, name) is not None
        }
        return pb.GenerateRequest(
            model=self.model,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            num_images=self.num_images,
            image_format=FORMATS[self.image_format],
            quality=self.quality,
            preview_interval=self.preview_interval,
            priority=self.priority,
            request_id=self.request_id,
            long_prompt=pb.LONG_PROMPT_TRUNCATE if self.truncate else pb.LONG_PROMPT_REFUSE,
            **optional,
        )

    def _check(self) -> None:
        if self.image_format not in FORMATS:
            raise ValueError(f"image_format: {self.image_format!r} is not accepted; {', '.join(FORMATS)} are")
        counts = ("width", "height", "num_inference_steps", "num_images", "quality", "preview_interval", "priority")
        for name, most in (*dict.fromkeys(counts, UINT32).items(), ("seed", INT63)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and 0 <= int(value) <= most):
                raise ValueError(f"{name}: {value!r} is not accepted; whole numbers from 0 to {most} are")
        if not isinstance(self.guidance_scale, Real | None):
            raise ValueError(f"guidance_scale: {self.guidance_scale!r} is not accepted; a number is")
        for name in ("prompt", "negative_prompt", "model", "request_id"):
            if not isinstance(text := getattr(self, name), str):
                raise ValueError(f"{name}: {text!r} is not accepted; text is")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name}: not accepted, for it is no valid text: {error}") from None


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image; `data` is a file of `format`, or 8-bit RGB rows for "raw"."""

    data: bytes = field(repr=False)
    format: str
    width: int
    height: int
    seed: int
    index: int

    @classmethod
    def from_message(cls, message: pb.Image) -> "GeneratedImage":
        """From the wire form."""
        return cls(
            message.data,
            FORMAT_NAMES[message.format],
            message.width,
            message.height,
            message.seed,
            message.index,
        )

    def pillow(self) -> "PillowImage":
        """As a Pillow image."""
        from PIL import Image

        if self.format == "raw":
            return Image.frombytes("RGB", (self.width, self.height), self.data)
        return Image.open(io.BytesIO(self.data)).convert("RGB")

    def save(self, path: str | Path) -> None:
        """Writes the file and creates the folders it needs; raw pixels are written in the format of the path's ending.

        An existing file is replaced atomically, or stays as it was if the writing fails.

        Raises:
            OSError: it cannot be written.
            ValueError: raw pixels, and no image format has the path's ending.
        """
        write_file(Path(path), self._encoded(Path(path).suffix) if self.format == "raw" else self.data)

    def _encoded(self, ending: str) -> bytes:
        from PIL import Image

        if (image_format := Image.registered_extensions().get(ending.lower())) is None:
            raise ValueError(f"{ending!r}: no ending of an image file; .png is one")
        encoded = io.BytesIO()
        self.pillow().save(encoded, image_format)
        return encoded.getvalue()


def write_file(path: Path, data: bytes) -> None:
    """Writes all of `data`, or leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Drawing:
    """Everything one request produced: its images by index, and the server's account of it."""

    request_id: str
    images: tuple[GeneratedImage, ...]
    completed: pb.Completed

    @classmethod
    def from_events(cls, events: Iterable[pb.GenerateEvent]) -> "Drawing":
        """From all events of a call that succeeded."""
        images, completed, request_id = [], pb.Completed(), ""
        for event in events:
            request_id = event.request_id
            match event.WhichOneof("event"):
                case "image":
                    images.append(GeneratedImage.from_message(event.image))
                case "completed":
                    completed = event.completed
        return cls(request_id, tuple(sorted(images, key=lambda i: i.index)), completed)
