"""Scenes the demo checkpoint was trained to draw: sampling, prompts in three languages and true pictures."""

import random
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo import words
from demo.shapes import CHARACTERS, SHAPES, distance
from demo.words import COLOURS, LAYOUTS, SIZES, Background, Thing

Image = NDArray[np.uint8]
Layout = tuple[str, tuple[Thing, ...]]

HELD_OUT = frozenset(
    {
        ("purple", "arrow"),
        ("cyan", "star"),
        ("orange", "crescent"),
        ("green", "ring"),
        ("pink", "square"),
        ("blue", "heart"),
        ("yellow", "cross"),
        ("red", "diamond"),
    }
)
KINDS = {"one": 28, "pair": 28, "row": 18, "count": 13, "character": 13}
GROUNDS = {"plain": 60, "gradient": 20, "striped": 20}
STRIPES = 8
GRADIENT_CLEARANCE = 80  # RGB distance that a colour keeps from every colour of a gradient it is drawn on
PLACE_JITTER, RADIUS_JITTER = 0.03, 0.04


@dataclass(frozen=True)
class Scene:
    """A prompt and what it asks for; `layout` is a key of LAYOUTS, one place a thing."""

    prompt: str
    language: str
    layout: str
    background: Background
    things: tuple[Thing, ...]

    @property
    def held_out(self) -> bool:
        """Whether a colour and shape meet here that never met in training."""
        return any((thing.colour, thing.shape) in HELD_OUT for thing in self.things)


def sample_scenes(count: int, seed: int, *, held_out: bool = False, kind: str = "") -> list[Scene]:
    """The same `count` scenes for the same arguments: none held out, or all; of one of KINDS, or mixed."""
    rng = random.Random(seed)
    return [_sample_scene(rng, held_out, kind) for _ in range(count)]


def phrase(scene: Scene, language: str, rng: random.Random) -> str:
    """A prompt for the scene in "en", "zh" or "mixed"."""
    asked = scene.layout, scene.things, scene.background
    if language == "en":
        return _capitalised(words.english(*asked, _variant(rng)), rng)
    if language == "zh":
        return words.chinese(*asked, _variant(rng))
    if scene.layout == "character" and rng.random() < 0.5:
        return _capitalised(words.english(*asked, _variant(rng)), rng)
    if rng.random() < 0.35:
        return words.english_with_chinese_ground(*asked)
    if rng.random() < 0.6:
        return words.chinese(*asked, _variant(rng)) + rng.choice(words.STYLES[:3])
    return words.english(*asked, 0) + rng.choice(words.STYLES[3:])


def render(scene: Scene, width: int, height: int) -> Image:
    """The true picture of a scene, uint8 [height, width, 3], edges smoothed over one pixel."""
    x, y = np.meshgrid(_axis(width), _axis(height))
    first, second = (np.array(COLOURS[c], np.float32) for c in (scene.background.first, scene.background.second))
    picture = first + ground_mix(np, scene.background.kind, x, y)[..., None] * (second - first)
    for thing in scene.things:
        covered = cover(np, thing.shape, (x - thing.x, y - thing.y), thing.radius, (width, height))
        picture += covered[..., None] * (np.array(COLOURS[thing.colour], np.float32) - picture)
    image: Image = picture.round().astype(np.uint8)
    return image


def ground_mix(xp: Any, kind: str, x: Any, y: Any) -> Any:
    """Share of the background's second colour at places x, y in [-1, 1], for numpy or torch."""
    match kind:
        case "gradient":
            return (y + 1) / 2
        case "striped":
            return xp.remainder(xp.floor((x + 1) * (STRIPES / 2)), 2.0)
        case _:
            return xp.zeros_like(x)


def cover(xp: Any, shape: str, offset: tuple[Any, Any], radius: Any, size: tuple[int, int]) -> Any:
    """Share of each pixel that a shape covers, for numpy or torch.

    `offset` is each pixel's place from the shape's centre, in halves of the image's width and height; `size` is
    the image's width and height in pixels.
    """
    short = min(size)
    x, y = offset[0] * (size[0] / short) / radius, offset[1] * (size[1] / short) / radius
    return xp.clip(0.5 - distance(xp, shape, x, y) * radius * (short / 2), 0.0, 1.0)


def _axis(pixels: int) -> NDArray[np.float32]:
    axis: NDArray[np.float32] = (np.arange(pixels, dtype=np.float32) * 2 + 1) / np.float32(pixels) - 1
    return axis


def _variant(rng: random.Random) -> int:
    return int(rng.random() < 0.3)


def _capitalised(prompt: str, rng: random.Random) -> str:
    return prompt[0].upper() + prompt[1:] if rng.random() < 0.2 else prompt


def _sample_scene(rng: random.Random, held_out: bool, kind: str) -> Scene:
    while True:
        background = _sample_background(rng)
        drawn = kind or rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        layout, things = _sample_layout(rng, drawn, _free_colours(background))
        scene = Scene("", "", layout, background, things)
        if scene.held_out == held_out:
            break
    language = rng.choice(("en", "en", "zh", "zh", "mixed"))
    if layout == "character" and language == "en":
        language = "mixed"
    return Scene(phrase(scene, language, rng), language, layout, background, things)


def _sample_background(rng: random.Random) -> Background:
    kind = rng.choices(tuple(GROUNDS), tuple(GROUNDS.values()))[0]
    if kind == "gradient":
        return Background(kind, *rng.choice(_gradients()))
    first, second = rng.sample(tuple(COLOURS), 2)
    return Background(kind, first, second if kind == "striped" else first)


def _sample_layout(rng: random.Random, kind: str, colours: tuple[str, ...]) -> Layout:
    if kind == "one":
        layout, size = rng.choice(words.POSITIONS), rng.choice(tuple(SIZES))
        return layout, (_sample_thing(rng, layout, 0, rng.choice(colours), size=size),)
    if kind == "character":
        character, colour = rng.choice(CHARACTERS), rng.choice(colours)
        return kind, (_placed(rng, Thing(character, colour, "", (0, 0), words.CHARACTER_RADIUS, 0, 0, 0)),)
    if kind == "count":
        return _sample_count(rng, rng.choice(colours))
    layout = rng.choice(words.RELATIONS if kind == "pair" else words.ROWS)
    chosen = rng.sample(colours, len(LAYOUTS[layout]))
    sized = kind == "pair" and rng.random() < 0.3
    sizes = [rng.choice(tuple(SIZES)) if sized else "" for _ in chosen]
    pairs = enumerate(zip(chosen, sizes, strict=True))
    return layout, tuple(_sample_thing(rng, layout, i, colour, size=size) for i, (colour, size) in pairs)


def _sample_count(rng: random.Random, colour: str) -> Layout:
    layout, shape = rng.choice(words.COUNTS), rng.choice(tuple(SHAPES))
    places = range(len(LAYOUTS[layout]))
    return layout, tuple(_sample_thing(rng, layout, i, colour, shape=shape) for i in places)


def _sample_thing(
    rng: random.Random, layout: str, index: int, colour: str, *, size: str = "", shape: str = ""
) -> Thing:
    places = LAYOUTS[layout]
    nominal = words.ROW_RADIUS if len(places) == 3 else SIZES[size]
    shape = shape or rng.choice(tuple(SHAPES))
    return _placed(rng, Thing(shape, colour, size, places[index], nominal, 0, 0, 0))


def _placed(rng: random.Random, thing: Thing) -> Thing:
    """The thing where its jitter puts it."""
    x, y = (place + rng.uniform(-PLACE_JITTER, PLACE_JITTER) for place in thing.place)
    radius = thing.nominal * (1 + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER))
    return Thing(thing.shape, thing.colour, thing.size, thing.place, thing.nominal, x, y, radius)


@cache
def _free_colours(background: Background) -> tuple[str, ...]:
    """The colours that stay apart from every colour of a background."""
    if background.kind != "gradient":
        return tuple(c for c in COLOURS if c not in (background.first, background.second))
    palette = np.array(list(COLOURS.values()), np.float32)
    first, second = (np.array(COLOURS[c], np.float32) for c in (background.first, background.second))
    line = first + np.linspace(0, 1, 33, dtype=np.float32)[:, None] * (second - first)
    gaps = np.linalg.norm(palette - line[:, None], axis=-1)
    near = set(gaps.argmin(1)) | set(np.flatnonzero(gaps.min(0) < GRADIENT_CLEARANCE))
    return tuple(colour for i, colour in enumerate(COLOURS) if i not in near)


@cache
def _gradients() -> tuple[tuple[str, str], ...]:
    """Colour pairs whose gradient leaves at least five colours to draw with."""
    pairs = permutations(COLOURS, 2)
    return tuple(pair for pair in pairs if len(_free_colours(Background("gradient", *pair))) >= 5)
