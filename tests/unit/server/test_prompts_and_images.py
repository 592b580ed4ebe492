"""Text in, files out."""

import io

import numpy as np
import pytest
import simplejpeg
import torch
from diffusers import ZImagePipeline
from PIL import Image as PillowImage

from server.errors import InvalidRequestError
from server.requests import ImageFormat, LongPrompt
from server.worker.images import Pixels, encode_image, joined, parts
from server.worker.prompts import PromptCache, PromptTokenizer, padded_length
from tests.conftest import CHECKPOINT


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(CHECKPOINT)


@pytest.mark.parametrize("prompt", ["a red circle", "红色背景上，一个蓝色圆形", "a star, 8k"])
def test_the_captions_are_as_long_as_diffusers_makes_them(
    tokenizer: PromptTokenizer, pipeline: ZImagePipeline, prompt: str
) -> None:
    embeds, _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)
    assert len(tokenizer.encode("prompt", prompt, LongPrompt.REFUSE)) == embeds[0].shape[0]


def test_a_long_prompt_is_refused_with_its_length_or_cut_when_asked(tokenizer: PromptTokenizer) -> None:
    long = "a red circle " * 400
    with pytest.raises(InvalidRequestError, match=r"prompt: \d{3,} tokens .* 512 at most .* TRUNCATE"):
        tokenizer.encode("prompt", long, LongPrompt.REFUSE)
    assert len(tokenizer.encode("prompt", long, LongPrompt.TRUNCATE)) == 512


def test_captions_are_padded_to_blocks_of_32() -> None:
    assert [padded_length((0,) * n) for n in (1, 32, 33, 512)] == [32, 32, 64, 512]


def test_the_cache_forgets_what_was_not_used_for_longest() -> None:
    cache = PromptCache(capacity=2)
    for key in (1, 2):
        cache.put((key,), torch.tensor([key]))
    cache.get((1,))
    cache.put((3,), torch.tensor([3]))
    assert cache.get((2,)) is None
    assert cache.get((1,)) is not None
    cache.clear()
    assert cache.get((1,)) is None


@pytest.mark.parametrize("image_format", [ImageFormat.PNG, ImageFormat.JPEG, ImageFormat.WEBP])
def test_every_format_holds_the_picture(image_format: ImageFormat) -> None:
    pixels = np.full((48, 64, 3), (200, 40, 40), np.uint8)
    image = PillowImage.open(io.BytesIO(encode_image(pixels, image_format, 90)))
    assert image.format == image_format.name
    assert image.size == (64, 48)
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels).max() <= 4


def test_png_and_raw_lose_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    image = PillowImage.open(io.BytesIO(encode_image(pixels, ImageFormat.PNG, 90)))
    assert np.array_equal(np.asarray(image), pixels)
    assert encode_image(pixels, ImageFormat.RAW, 90) == pixels.tobytes()


@pytest.mark.parametrize("size", [(1024, 1024), (272, 1328), (1328, 272), (512, 512), (1040, 2048), (64, 64)])
@pytest.mark.parametrize("quality", [1, 90, 100])
def test_a_jpeg_in_strips_is_the_same_picture(size: tuple[int, int], quality: int) -> None:
    """To any reader: the library that encodes, and Pillow's."""
    pixels = photograph(*size)
    strips = parts(pixels, ImageFormat.JPEG)
    assert len(strips) == max(1, min(4, size[0] * size[1] // 2**17))
    whole = encode_image(pixels, ImageFormat.JPEG, quality)
    one = joined([encode_image(strip, ImageFormat.JPEG, quality) for strip in strips], pixels)
    assert np.array_equal(simplejpeg.decode_jpeg(one), simplejpeg.decode_jpeg(whole))
    assert np.array_equal(*(np.asarray(PillowImage.open(io.BytesIO(file))) for file in (one, whole)))
    assert len(one) <= len(whole) + 128
    if len(strips) == 1:
        assert one == whole


def test_a_jpeg_has_more_strips_when_more_blocks_than_can_be_said_would_be_in_one() -> None:
    pixels = np.full((8192, 8192, 3), 200, np.uint8)
    strips = parts(pixels, ImageFormat.JPEG)
    assert len(strips) == 5
    one = joined([encode_image(strip, ImageFormat.JPEG, 50) for strip in strips], pixels)
    assert np.array_equal(simplejpeg.decode_jpeg(one), pixels)


def photograph(height: int, width: int) -> Pixels:
    """Shades, edges and some noise."""
    y, x = np.mgrid[:height, :width]
    shade = np.stack([x * 255 / width, y * 255 / height, (x // 40 + y // 24) % 2 * 200], -1)
    noise = np.random.default_rng(0).normal(0, 12, shade.shape)
    return (shade + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("image_format", [ImageFormat.PNG, ImageFormat.WEBP, ImageFormat.RAW])
def test_other_formats_are_encoded_whole(image_format: ImageFormat) -> None:
    pixels = photograph(1024, 1024)
    (whole,) = parts(pixels, image_format)
    assert joined([encode_image(whole, image_format, 90)], pixels) == encode_image(pixels, image_format, 90)
