"""The grammar: what sampling, prompts and rendering promise."""

import numpy as np
import pytest

from demo.scenes import HELD_OUT, KINDS, render, sample_scenes
from demo.shapes import CHARACTERS, SHAPES
from demo.words import COLOURS, LAYOUTS


def test_same_seed_same_scenes() -> None:
    assert sample_scenes(20, 7) == sample_scenes(20, 7)
    assert sample_scenes(20, 7) != sample_scenes(20, 8)


def test_every_language_and_layout_occurs_and_chinese_is_chinese() -> None:
    scenes = sample_scenes(400, 1)
    assert {scene.language for scene in scenes} == {"en", "zh", "mixed"}
    assert {scene.layout for scene in scenes} == set(LAYOUTS)
    for scene in scenes:
        assert scene.prompt.isascii() == (scene.language == "en")


def test_prompt_names_what_is_drawn() -> None:
    for scene in sample_scenes(200, 2):
        if scene.language == "en":
            words = scene.prompt.lower()
            assert scene.background.first in words and scene.background.second in words
            assert all(thing.colour in words and thing.shape in words for thing in scene.things)


def test_every_thing_has_its_place_in_the_layout() -> None:
    for scene in sample_scenes(200, 3):
        assert tuple(thing.place for thing in scene.things) == LAYOUTS[scene.layout]


def test_held_out_pairs_are_kept_apart() -> None:
    assert not any(scene.held_out for scene in sample_scenes(300, 4))
    assert all(scene.held_out for scene in sample_scenes(50, 4, held_out=True))
    assert all(colour in COLOURS and shape in SHAPES for colour, shape in HELD_OUT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_can_be_asked_for(kind: str) -> None:
    for scene in sample_scenes(20, 5, kind=kind):
        assert (scene.things[0].shape in CHARACTERS) == (kind == "character")
        assert (len(scene.things) == 1) == (kind in ("one", "character"))


@pytest.mark.parametrize("size", [(64, 64), (128, 96), (80, 144)])
def test_render_has_the_size_and_background_asked_for(size: tuple[int, int]) -> None:
    for scene in sample_scenes(20, 6):
        picture = render(scene, *size)
        assert picture.shape == (size[1], size[0], 3)
        assert picture.dtype == np.uint8
        assert np.abs(picture[0, 0] - np.array(COLOURS[scene.background.first])).max() <= 4
