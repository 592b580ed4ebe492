"""The response cache: what may be answered from it, and how much it keeps."""

from dataclasses import replace

import pytest

from export.manifest import Backend
from export.spec import Component
from server.frontend.cache import ENTRY_BYTES, ResponseCache, ResponseKey, response_key
from server.requests import (
    Completed,
    EngineUse,
    GenerationRequest,
    Image,
    ImageFormat,
    InstanceInfo,
    MemoryUse,
    Timings,
)
from tests.fakes import a_request

INSTANCE = InstanceInfo("w", "cpu", "1", "fp32", (EngineUse(Component.DENOISER, Backend.ONNXRUNTIME),), MemoryUse(), ())
MODEL = object()


def key_of(request: GenerationRequest, instance: InstanceInfo = INSTANCE, model: object = MODEL) -> ResponseKey:
    return response_key(request, instance, model)


def keys(count: int, model: object = MODEL) -> list[ResponseKey]:
    return [key_of(replace(a_request(), seed=seed), model=model) for seed in range(count)]


def kept(cache: ResponseCache, among: list[ResponseKey]) -> list[bool]:
    return [cache.get(key) is not None for key in among]


def answer(size: int) -> tuple[Image | Completed, ...]:
    done = Completed(Timings(total_ms=9.0), (), prompt_cached=False, denoiser_forwards=2)
    return Image(0, 7, 64, 64, ImageFormat.RAW, bytes(size)), done


def test_an_answer_comes_back_and_says_where_from() -> None:
    cache = ResponseCache(100 + ENTRY_BYTES)
    key = key_of(a_request())
    assert cache.get(key) is None
    cache.put(key, answer(60))
    image, done = cache.get(key) or ()
    assert (image, done) == (answer(60)[0], replace(answer(60)[1], response_cached=True))


def test_the_least_recently_used_goes_first() -> None:
    cache, made = ResponseCache(2 * (ENTRY_BYTES + 40)), keys(3)
    for key in made:
        cache.put(key, answer(40))
        cache.get(made[0])
    assert kept(cache, made) == [True, False, True]


def test_an_answer_that_does_not_fit_leaves_the_others_where_they_are() -> None:
    cache, made = ResponseCache(2 * ENTRY_BYTES + 100), keys(3)
    for key, size in zip(made, (40, 40, ENTRY_BYTES + 200), strict=True):
        cache.put(key, answer(size))
    assert kept(cache, made) == [True, True, False]


def test_answers_without_an_image_to_speak_of_fill_it_too() -> None:
    """Else as many would be kept as there are requests."""
    cache, made = ResponseCache(2 * ENTRY_BYTES), keys(3)
    for key in made:
        cache.put(key, answer(0))
    assert kept(cache, made) == [False, True, True]


def test_an_answer_that_two_have_asked_for_at_once_takes_the_room_of_one() -> None:
    cache, made = ResponseCache(2 * ENTRY_BYTES), keys(2)
    for key in (made[0], made[0], made[1]):
        cache.put(key, answer(0))
    assert kept(cache, made) == [True, True]


def test_a_key_is_small_whatever_the_prompt() -> None:
    short, long = key_of(a_request()), key_of(replace(a_request(), prompt="x" * 32_768))
    assert len(long.digest) == len(short.digest) == 32


def test_what_is_loaded_anew_has_none_of_the_old_answers() -> None:
    """Its version may have the same number and other weights."""
    cache, again = ResponseCache(10 * ENTRY_BYTES), object()
    cache.put(key_of(a_request()), answer(40))
    assert kept(cache, [key_of(a_request(), model=again)]) == [False]
    cache.put(key_of(a_request(), model=again), answer(40))
    cache.forget(MODEL)
    assert kept(cache, [key_of(a_request()), key_of(a_request(), model=again)]) == [False, True]


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
    assert key_of(replace(a_request(), **change)) != key_of(a_request())  # type: ignore[arg-type]


def test_engines_are_part_of_the_key_and_who_asks_is_not() -> None:
    eager = replace(INSTANCE, engines=(EngineUse(Component.DENOISER, Backend.EAGER, "it broke"),))
    key = key_of(a_request())
    assert key_of(a_request(), eager) != key
    assert key_of(replace(a_request(), request_id="other", priority=1, timeout=3.0)) == key
    assert key_of(replace(a_request(), waited=3.0, delayed=True, queue_timeout=3.0, preview_interval=1)) == key
