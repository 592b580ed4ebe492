"""The score: truth is all-correct, and each planted fault fails its own field alone."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image as PillowImage
from PIL import ImageFilter

from demo.scenes import KINDS, Image, Scene, render, sample_scenes
from demo.score import Score, score
from demo.shapes import CHARACTERS, SHAPES
from demo.words import CHARACTER_RADIUS, COLOURS, LAYOUTS, POSITIONS, RELATIONS, ROW_RADIUS, SIZES, Background, Thing

IMAGE_SIZES = [(128, 128), (256, 256), (384, 256), (512, 512), (768, 1344), (1024, 1024)]
RIGHT = Score(background=True, colours=True, layout=True, shapes=True)
PLAIN = Background("plain", "yellow", "yellow")
GRADIENT = Background("gradient", "white", "cyan")
STRIPED = Background("striped", "white", "black")
PALETTE = ("red", "blue", "green", "purple")


def scene(layout: str, *shapes: str, size: str = "", background: Background = PLAIN) -> Scene:
    """A scene without jitter; every thing has its own colour, except in counts."""
    places = LAYOUTS[layout]
    radius = ROW_RADIUS if len(places) == 3 else CHARACTER_RADIUS if layout == "character" else SIZES[size]
    colours = PALETTE if len(shapes) == len(places) else ("red",) * 4
    names = shapes if len(shapes) == len(places) else shapes * len(places)
    things = tuple(Thing(n, c, size, p, radius, *p, radius) for n, c, p in zip(names, colours, places, strict=False))
    return Scene("", "en", layout, background, things)


def truth(asked: Scene, width: int = 128, height: int = 128) -> Score:
    return score(render(asked, width, height), asked)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_at_every_size_and_position(shape: str) -> None:
    for size in SIZES:
        assert all(truth(scene(position, shape, size=size)) == RIGHT for position in POSITIONS)


@pytest.mark.parametrize("background", [PLAIN, GRADIENT, STRIPED], ids=lambda b: b.kind)
def test_every_relation_on_every_background(background: Background) -> None:
    assert all(truth(scene(r, "star", "ring", background=background)) == RIGHT for r in RELATIONS)


@pytest.mark.parametrize("layout", ["from left to right", "from top to bottom"])
def test_rows(layout: str) -> None:
    assert truth(scene(layout, "star", "ring", "arrow")) == RIGHT


@pytest.mark.parametrize("layout", ["two", "three", "four"])
def test_counts(layout: str) -> None:
    assert truth(scene(layout, "heart")) == RIGHT


@pytest.mark.parametrize("character", CHARACTERS)
def test_every_character(character: str) -> None:
    assert truth(scene("character", character)) == RIGHT


@pytest.mark.parametrize("colour", [colour for colour in COLOURS if colour != "yellow"])
def test_every_colour(colour: str) -> None:
    asked = scene("", "star")
    assert truth(replace(asked, things=(replace(asked.things[0], colour=colour),))) == RIGHT


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_sampled_scenes_at_every_image_size(size: tuple[int, int]) -> None:
    count = 60 if size[0] <= 256 else 8
    assert [s.prompt for s in sample_scenes(count, 11) if truth(s, *size) != RIGHT] == []


def blurred(asked: Scene, pixels: float) -> Image:
    """The truth at 256x256 as an autoencoder may leave it: blurred by a Gaussian of so many pixels."""
    picture = PillowImage.fromarray(render(asked, 256, 256))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(pixels)))


def test_blurred_truth_is_right() -> None:
    assert [s.prompt for s in sample_scenes(60, 11) if score(blurred(s, 2), s) != RIGHT] == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_small_blurred_shape_is_itself_and_no_other(shape: str) -> None:
    picture = blurred(scene("", shape, size="small"), 4)
    assert [name for name in SHAPES if score(picture, scene("", name, size="small")).shapes] == [shape]


def edged(background: Background = PLAIN) -> tuple[Scene, Thing, Thing]:
    """A row, its first thing, and its last."""
    asked = scene("from left to right", "arrow", "star", "cross", background=background)
    return asked, asked.things[0], asked.things[-1]


@pytest.mark.parametrize("background", [PLAIN, GRADIENT, STRIPED], ids=lambda b: b.kind)
def test_an_edge_in_another_things_colour_is_none_of_that_thing(background: Background) -> None:
    asked, first, last = edged(background)
    below = replace(last, colour=first.colour, radius=last.radius * 1.1)
    assert faulty(replace(asked, things=(below, *asked.things)), asked) == RIGHT


@pytest.mark.parametrize("where", ["alone", "touching another"])
def test_a_thing_too_many_in_an_asked_colour_is_no_edge(where: str) -> None:
    asked, first, last = edged()
    x, y = (0.0, 0.7) if where == "alone" else (last.x - last.radius, last.y)
    extra = replace(first, shape="circle", x=x, y=y, radius=0.14)
    assert not faulty(replace(asked, things=(extra, *asked.things)), asked).all_correct


def faulty(drawn: Scene, asked: Scene) -> Score:
    return score(render(drawn, 256, 256), asked)


@pytest.mark.parametrize("background", [PLAIN, GRADIENT, STRIPED], ids=lambda b: b.kind)
@pytest.mark.parametrize("colour", ["orange", "pink"])
def test_wrong_colour_fails_colours_alone(colour: str, background: Background) -> None:
    for asked in (scene("", "cross", background=background), scene("above", "star", "ring", background=background)):
        first, *others = asked.things
        drawn = replace(asked, things=(replace(first, colour=colour), *others))
        assert faulty(drawn, asked) == replace(RIGHT, colours=False)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_too_many_fails_colours_alone(colour: str) -> None:
    ground, *others = (name for name in COLOURS if name != colour)
    asked = scene("above", "star", "ring", background=Background("plain", ground, ground))
    things = tuple(replace(thing, colour=other) for thing, other in zip(asked.things, others, strict=False))
    extra = Thing("circle", colour, "", (0.7, 0.7), 0.2, 0.7, 0.7, 0.2)
    assert faulty(replace(asked, things=(*things, extra)), replace(asked, things=things)) == replace(
        RIGHT, colours=False
    )


@pytest.mark.parametrize("background", [Background("plain", "green", "green"), STRIPED], ids=lambda b: b.kind)
def test_wrong_background_fails_background_alone(background: Background) -> None:
    asked = scene("above", "star", "ring")
    assert faulty(replace(asked, background=background), asked) == replace(RIGHT, background=False)


def test_a_gradient_is_no_plain_background() -> None:
    asked = scene("above", "star", "ring")
    assert not faulty(replace(asked, background=GRADIENT), asked).background


def test_a_gradient_upside_down_is_a_wrong_background() -> None:
    asked = scene("", "star", background=GRADIENT)
    drawn = replace(asked, background=Background("gradient", "cyan", "white"))
    assert not faulty(drawn, asked).background


@pytest.mark.parametrize("relation", RELATIONS)
def test_swapped_things_fail_layout_alone(relation: str) -> None:
    asked = scene(relation, "star", "ring")
    first, second = asked.things
    swapped = (replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y))
    assert faulty(replace(asked, things=swapped), asked) == replace(RIGHT, layout=False)


def test_wrong_position_fails_layout_alone() -> None:
    asked, drawn = scene("in the top left corner", "star"), scene("in the top right corner", "star")
    assert faulty(drawn, asked) == replace(RIGHT, layout=False)


@pytest.mark.parametrize(("asked", "drawn"), [("small", "large"), ("small", ""), ("", "large"), ("large", "")])
def test_wrong_size_fails_layout_alone(asked: str, drawn: str) -> None:
    assert faulty(scene("", "star", size=drawn), scene("", "star", size=asked)) == replace(RIGHT, layout=False)


@pytest.mark.parametrize(("asked", "drawn"), [("two", "three"), ("three", "two"), ("four", "two"), ("three", "four")])
def test_wrong_count_is_never_right(asked: str, drawn: str) -> None:
    assert not faulty(scene(drawn, "circle"), scene(asked, "circle")).all_correct


@pytest.mark.parametrize("shape", SHAPES)
def test_wrong_shape_is_a_wrong_shape(shape: str) -> None:
    for other in SHAPES:
        if other != shape:
            verdict = faulty(scene("", other, size="small"), scene("", shape, size="small"))
            assert replace(verdict, layout=True) == replace(RIGHT, shapes=False)


@pytest.mark.parametrize("character", CHARACTERS)
def test_wrong_character_is_a_wrong_shape(character: str) -> None:
    for other in CHARACTERS:
        if other != character:
            assert not faulty(scene("character", other), scene("character", character)).shapes


def test_wrong_shape_of_the_same_area_fails_shapes_alone() -> None:
    assert faulty(scene("", "circle"), scene("", "heart")) == replace(RIGHT, shapes=False)


@pytest.mark.parametrize("level", [0, 127, 255])
def test_an_empty_picture_is_never_right(level: int) -> None:
    blank = np.full((256, 256, 3), level, np.uint8)
    assert not any(score(blank, s).all_correct for s in sample_scenes(20, 5))


def test_noise_is_never_right() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    assert not any(score(noise, s).all_correct for s in sample_scenes(20, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_another_scene_is_never_right(kind: str) -> None:
    scenes = sample_scenes(20, 7, kind=kind)
    assert not any(score(render(a, 128, 128), b).all_correct for a, b in pairwise(scenes))
