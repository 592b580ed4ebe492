"""Scenes as arrays: what to draw, what to read and the prompts' tokens."""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo.scenes import GROUNDS, Scene, phrase, sample_scenes
from demo.shapes import DRAWABLE
from demo.words import COLOURS, LAYOUTS, SIZES, Thing

LANGUAGES = ("en", "zh", "mixed")
SLOTS = 4
KINDS, PALETTE = tuple(GROUNDS), tuple(COLOURS)
# What the text encoder learns to tell: the places, three things in reading order, the background.
NONE = 1
QUESTIONS = (len(LAYOUTS), *(len(DRAWABLE) + NONE, len(PALETTE) + NONE, len(SIZES) + NONE) * 3, 3, 10, 10)


@dataclass(frozen=True)
class SceneArrays:
    """`n` scenes with SLOTS things each, the unused ones with shape -1."""

    prompts: list[str]  # n * len(LANGUAGES), the scene's languages beside each other
    shapes: NDArray[np.int64]  # [n, SLOTS], into DRAWABLE
    colours: NDArray[np.int64]  # [n, SLOTS], into PALETTE
    places: NDArray[np.float32]  # [n, SLOTS, 3]: x, y, radius
    grounds: NDArray[np.int64]  # [n, 3]: kind, first colour, second colour
    answers: NDArray[np.int64]  # [n, len(QUESTIONS)]

    def __len__(self) -> int:
        return len(self.shapes)

    def part(self, indices: NDArray[np.int64]) -> "SceneArrays":
        """The scenes at `indices`, without their prompts."""
        shapes, colours, places = self.shapes[indices], self.colours[indices], self.places[indices]
        return SceneArrays([], shapes, colours, places, self.grounds[indices], self.answers[indices])


def make_scenes(count: int, seed: int) -> SceneArrays:
    """`count` training scenes, none of them held out."""
    return pack_scenes(sample_scenes(count, seed), seed)


def pack_scenes(scenes: list[Scene], seed: int) -> SceneArrays:
    rng = random.Random(seed)
    things = [[*scene.things, *[None] * (SLOTS - len(scene.things))] for scene in scenes]
    return SceneArrays(
        prompts=[phrase(scene, language, rng) for scene in scenes for language in LANGUAGES],
        shapes=np.array([[DRAWABLE.index(t.shape) if t else -1 for t in row] for row in things]),
        colours=np.array([[PALETTE.index(t.colour) if t else 0 for t in row] for row in things]),
        places=np.array([[(t.x, t.y, t.radius) if t else (0, 0, 1) for t in row] for row in things], np.float32),
        grounds=np.array([_ground(scene) for scene in scenes]),
        answers=np.array([_answers(scene) for scene in scenes]),
    )


def _ground(scene: Scene) -> tuple[int, int, int]:
    ground = scene.background
    return KINDS.index(ground.kind), PALETTE.index(ground.first), PALETTE.index(ground.second)


def _answers(scene: Scene) -> list[int]:
    """One class a question; things are told from the top left, so that relations have to be understood."""
    ordered = sorted(scene.things, key=lambda thing: (thing.place[1], thing.place[0]))[:3]
    seen = [answer for thing in ordered for answer in _thing_answers(thing)]
    unseen = [len(DRAWABLE), len(PALETTE), len(SIZES)] * (3 - len(ordered))
    return [_places_asked(scene), *seen, *unseen, *_ground(scene)]


def _thing_answers(thing: Thing) -> tuple[int, int, int]:
    return DRAWABLE.index(thing.shape), PALETTE.index(thing.colour), tuple(SIZES).index(thing.size)


def _places_asked(scene: Scene) -> int:
    """The first layout with the same places in any order."""
    places = sorted(LAYOUTS[scene.layout])
    if scene.layout in ("two", "three", "four", "character"):
        return tuple(LAYOUTS).index(scene.layout)
    return next(i for i, layout in enumerate(LAYOUTS) if sorted(LAYOUTS[layout]) == places)
