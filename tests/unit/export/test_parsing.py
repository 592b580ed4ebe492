"""JSON into dataclasses, and what is refused."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from export.parsing import parsed


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Leaf:
    weight: tuple[float, float]
    colour: Colour = Colour.RED


@dataclass(frozen=True)
class Tree:
    name: str
    leaves: tuple[Leaf, ...]
    sizes: dict[str, int]
    best: Leaf | None = None
    place: Path = Path()


TREE = Tree("oak", (Leaf((1.0, 2.5)), Leaf((0.0, 1.0))), {"height": 3}, Leaf((1.0, 1.0)), Path("in/a wood"))


def test_what_is_written_is_read_again() -> None:
    assert parsed(Tree, json.loads(json.dumps(asdict(TREE), default=str))) == TREE
    assert parsed(Tree, {"name": "bare", "leaves": [], "sizes": {}, "best": None}) == Tree("bare", (), {})
    assert parsed(Leaf, {"weight": [1, 2]}) == Leaf((1, 2)), "JSON writes 1.0 as 1"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bark": 1}, "bark"),
        ({"name": 5}, "5 is not str"),
        ({"place": 5}, "int"),
        ({"sizes": {"height": "tall"}}, "'tall' is not int"),
        ({"best": {"weight": [1.0, 2.0], "colour": "blue"}}, "blue"),
        ({"best": {"weight": [1.0]}}, "zip"),
        ({"best": {}}, "weight"),
        ({"best": [1.0]}, r"\[1.0\] is not dict"),
        ({"leaves": {"a": 1}}, "is not list"),
        ({"sizes": [3]}, r"\[3\] is not dict"),
        ({"sizes": {"height": True}}, "True is not int"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        parsed(Tree, asdict(TREE) | change)
