"""The response cache: what may be answered from it, and how much it keeps."""

from dataclasses import replace

import pytest

from export.manifest import Backend
from export.spec import Component
from server.frontend.cache import ResponseCache, response_key
from server.requests import Completed, EngineUse, Image, ImageFormat, InstanceInfo, MemoryUse, Timings
from tests.fakes import a_request

INSTANCE = InstanceInfo("w", "cpu", "1", "fp32", (EngineUse(Component.DENOISER, Backend.ONNXRUNTIME),), MemoryUse(), ())


def answer(size: int) -> tuple[Image | Completed, ...]:
    done = Completed(Timings(total_ms=9.0), (), prompt_cached=False, denoiser_forwards=2)
    return Image(0, 7, 64, 64, ImageFormat.RAW, bytes(size)), done


def test_an_answer_comes_back_and_says_where_from() -> None:
    cache = ResponseCache(100)
    key = response_key(a_request(), INSTANCE)
    assert cache.get(key) is None
    cache.put(key, answer(60))
    image, done = cache.get(key) or ()
    assert (image, done) == (answer(60)[0], replace(answer(60)[1], response_cached=True))


def test_the_least_recently_used_goes_first() -> None:
    cache = ResponseCache(100)
    for key in "abc":
        cache.put(key, answer(40))
        cache.get("a")
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "x"},
        {"negative_prompt": "x"},
        {"seed": 8},
        {"num_inference_steps": 3},
        {"width": 80},
        {"height": 80},
        {"guidance_scale": 1.0},
        {"num_images": 2},
        {"image_format": ImageFormat.JPEG},
        {"quality": 80},
    ],
)
def test_whatever_changes_the_bytes_changes_the_key(change: dict[str, object]) -> None:
    assert response_key(replace(a_request(), **change), INSTANCE) != response_key(a_request(), INSTANCE)  # type: ignore[arg-type]


def test_engines_are_part_of_the_key_and_who_asks_is_not() -> None:
    eager = replace(INSTANCE, engines=(EngineUse(Component.DENOISER, Backend.EAGER, "it broke"),))
    key = response_key(a_request(), INSTANCE)
    assert response_key(a_request(), eager) != key
    assert response_key(replace(a_request(), request_id="other", priority=1, timeout=3.0), INSTANCE) == key
