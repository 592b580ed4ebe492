"""Every bad field is refused with its name, its value and what is accepted."""

import dataclasses
import math

import pytest

from export.manifest import Backend
from export.spec import Component
from protos.zserve.v1 import image_generation_pb2 as pb
from server.config import ModelConfig
from server.errors import InvalidRequestError
from server.requests import (
    Completed,
    EngineUse,
    Event,
    Image,
    ImageFormat,
    LongPrompt,
    Preview,
    Progress,
    Queued,
    Started,
    Timings,
)
from server.rpc.convert import (
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    decode_event,
    decode_request,
    encode_event,
    encode_request,
)
from tests.fakes import a_request

LIMITS = {"min_size": 128, "max_size": 1024, "max_num_inference_steps": 40, "max_num_images": 3}  # none of the defaults
MODEL = ModelConfig("demo", default_size=(256, 192), **LIMITS)  # type: ignore[arg-type]


def test_what_is_absent_is_the_models_default() -> None:
    request = decode_request(pb.GenerateRequest(prompt="a cat"), MODEL, None)
    assert (request.width, request.height, request.num_inference_steps) == (256, 192, 8)
    assert (request.guidance_scale, request.num_images, request.quality) == (0.0, 1, 90)
    assert (request.image_format, request.long_prompt) == (ImageFormat.PNG, LongPrompt.REFUSE)
    assert request.priority == MODEL.queue.default_level
    assert request.model == "demo"
    assert request.request_id


def test_absent_seeds_differ() -> None:
    seeds = {decode_request(pb.GenerateRequest(prompt="a cat"), MODEL, None).seed for _ in range(8)}
    assert len(seeds) > 1


def test_a_seed_of_zero_is_a_seed() -> None:
    assert decode_request(pb.GenerateRequest(prompt="a cat", seed=0), MODEL, None).seed == 0


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("prompt", "", "a description"),
        ("prompt", "  \n", "a description"),
        ("prompt", "x" * 40_000, "32768 characters"),
        ("negative_prompt", "x" * 40_000, "32768 characters"),
        ("width", 250, "a multiple of 16 from 128 to 1024"),
        ("width", 0, "a multiple of 16"),
        ("height", 1040, "from 128 to 1024"),
        ("height", 112, "from 128 to 1024"),
        ("num_inference_steps", 0, "from 1 to 40"),
        ("num_inference_steps", 41, "from 1 to 40"),
        ("guidance_scale", math.nan, "a number from 0 to 20"),
        ("guidance_scale", math.inf, "a number from 0 to 20"),
        ("guidance_scale", 20.1, "a number from 0 to 20"),
        ("guidance_scale", -1.0, "a number from 0 to 20"),
        ("seed", MAX_SEED + 1, f"0 to {MAX_SEED}"),
        ("num_images", 0, "from 1 to 3"),
        ("num_images", 4, "from 1 to 3"),
        ("quality", 0, "from 1 to 100"),
        ("quality", 101, "from 1 to 100"),
        ("image_format", 17, "PNG, JPEG, WEBP and RAW"),
        ("long_prompt", 9, "REFUSE and TRUNCATE"),
        ("preview_interval", 41, "from 0 to 40"),
        ("priority", 99, "from 1 to 8"),
        ("request_id", "x" * 129, "128 printable"),
        ("request_id", "a\nb", "128 printable"),
        ("sampler", "dpm++", '"euler" is: Z-Image-Turbo is distilled'),
    ],
)
def test_a_bad_field_is_named(field: str, value: object, accepted: str) -> None:
    message = pb.GenerateRequest(prompt="a cat")
    setattr(message, field, value)
    with pytest.raises(InvalidRequestError) as caught:
        decode_request(message, MODEL, None)
    assert str(caught.value).startswith(f"{field}: ")
    assert accepted in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("prompt", "x" * MAX_PROMPT_CHARACTERS), ("seed", MAX_SEED)])
def test_the_most_that_is_accepted_is_accepted(field: str, value: object) -> None:
    message = pb.GenerateRequest(prompt="a cat")
    setattr(message, field, value)
    assert getattr(decode_request(message, MODEL, None), field) == value


def test_the_last_image_needs_a_seed_too() -> None:
    with pytest.raises(InvalidRequestError, match="seed"):
        decode_request(pb.GenerateRequest(prompt="a cat", seed=MAX_SEED, num_images=2), MODEL, None)


@pytest.mark.parametrize(("asked", "seconds"), [(0, None), (2_500_000, 2.5)])
def test_a_queue_timeout_is_in_microseconds_and_0_is_none(asked: int, seconds: float | None) -> None:
    message = pb.GenerateRequest(prompt="x", queue_timeout_microseconds=asked)
    assert decode_request(message, MODEL, None).queue_timeout == seconds


def test_a_queue_timeout_of_any_length_can_be_sent_on() -> None:
    asked = pb.GenerateRequest(prompt="x", queue_timeout_microseconds=2**64 - 1)
    request = decode_request(asked, MODEL, None)
    assert encode_request(request).queue_timeout_microseconds == 2**64 - 1


def test_a_request_survives_the_way_to_a_worker() -> None:
    request = dataclasses.replace(
        a_request(),
        negative_prompt="蓝色",
        guidance_scale=1.5,
        num_images=2,
        image_format=ImageFormat.WEBP,
        preview_interval=2,
        long_prompt=LongPrompt.TRUNCATE,
        timeout=3.0,
    )
    assert decode_request(encode_request(request), dataclasses.replace(MODEL, min_size=64), 3.0) == request


EVENTS: list[Event] = [
    Queued(3),
    Queued(3, 1500.0),
    Started("demo-0", 2),
    Progress(2, 8, 1, 40.0, 4, 3),
    Preview(2, 1, b"jpeg", 32, 24),
    Image(1, 7, 256, 192, ImageFormat.RAW, b"pixels", 5.0, 6.0),
    Completed(
        Timings(1, 2, 3, 4, 5, 15),
        (EngineUse(Component.DENOISER, Backend.EAGER, "because"),),
        True,
        denoiser_forwards=16,
        response_cached=True,
    ),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: type(e).__name__)
def test_an_event_survives_the_way_from_a_worker(event: Event) -> None:
    message = encode_event(event, "id")
    assert message.request_id == "id"
    assert decode_event(pb.GenerateEvent.FromString(message.SerializeToString())) == event


def test_an_event_of_a_newer_peer_is_passed_over() -> None:
    assert decode_event(pb.GenerateEvent(request_id="id")) is None
