"""The vocabulary of the demo's scenes and the phrases that put one into words.

Places are in [-1, 1] on each axis of the image, y down.
"""

from dataclasses import dataclass

COLOURS = {
    "red": (220, 40, 40),
    "orange": (250, 130, 20),
    "yellow": (250, 220, 50),
    "green": (40, 170, 70),
    "cyan": (40, 200, 225),
    "blue": (45, 80, 220),
    "purple": (140, 60, 180),
    "pink": (250, 150, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SIZES = {"small": 0.20, "": 0.29, "large": 0.42}  # radius in halves of the short side
ROW_RADIUS, CHARACTER_RADIUS = 0.24, 0.68
NEAR, FAR = 0.48, 0.64
LAYOUTS: dict[str, tuple[tuple[float, float], ...]] = {
    "": ((0.0, 0.0),),
    "in the center": ((0.0, 0.0),),
    "in the top left corner": ((-NEAR, -NEAR),),
    "in the top right corner": ((NEAR, -NEAR),),
    "in the bottom left corner": ((-NEAR, NEAR),),
    "in the bottom right corner": ((NEAR, NEAR),),
    "to the left of": ((-NEAR, 0.0), (NEAR, 0.0)),
    "to the right of": ((NEAR, 0.0), (-NEAR, 0.0)),
    "above": ((0.0, -NEAR), (0.0, NEAR)),
    "below": ((0.0, NEAR), (0.0, -NEAR)),
    "from left to right": ((-FAR, 0.0), (0.0, 0.0), (FAR, 0.0)),
    "from top to bottom": ((0.0, -FAR), (0.0, 0.0), (0.0, FAR)),
    "two": ((-NEAR, 0.0), (NEAR, 0.0)),
    "three": ((-FAR, 0.0), (0.0, 0.0), (FAR, 0.0)),
    "four": ((-NEAR, -NEAR), (NEAR, -NEAR), (-NEAR, NEAR), (NEAR, NEAR)),
    "character": ((0.0, 0.0),),
}
POSITIONS = tuple(LAYOUTS)[:6]
RELATIONS = tuple(LAYOUTS)[6:10]
ROWS = tuple(LAYOUTS)[10:12]
COUNTS = tuple(LAYOUTS)[12:15]
STYLES = (", 8k", ", flat design", ", minimal", "，高清", "，扁平风格")
CHINESE = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "cyan": "青色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "white": "白色",
    "black": "黑色",
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "ring": "圆环",
    "cross": "十字",
    "diamond": "菱形",
    "heart": "心形",
    "crescent": "月牙",
    "arrow": "箭头",
    "semicircle": "半圆",
    "small": "小的",
    "": "",
    "large": "大的",
    "in the center": "正中央",
    "in the top left corner": "左上角",
    "in the top right corner": "右上角",
    "in the bottom left corner": "左下角",
    "in the bottom right corner": "右下角",
    "to the left of": "左边",
    "to the right of": "右边",
    "above": "上方",
    "below": "下方",
    "from left to right": "从左到右",
    "from top to bottom": "从上到下",
    "two": "两个",
    "three": "三个",
    "four": "四个",
}


@dataclass(frozen=True)
class Background:
    """`kind` is plain (second equals first), gradient (first above, second below) or striped (upright)."""

    kind: str
    first: str
    second: str


@dataclass(frozen=True)
class Thing:
    """One drawn shape or character: the place asked for, and where its seed's small jitter puts it.

    Places are in [-1, 1]; radii, nominal and drawn, in halves of the image's short side.
    """

    shape: str
    colour: str
    size: str
    place: tuple[float, float]
    nominal: float
    x: float
    y: float
    radius: float


def english(layout: str, things: tuple[Thing, ...], background: Background, variant: int) -> str:
    """An English prompt; variant 1 names the background first."""
    drawn, ground = _drawn_in_english(layout, things, variant), with_article(_ground_in_english(background))
    return f"on {ground}, {drawn}" if variant else f"{drawn} on {ground}"


def chinese(layout: str, things: tuple[Thing, ...], background: Background, variant: int) -> str:
    """A Chinese prompt; variant 1 names the background last."""
    drawn, ground = _drawn_in_chinese(layout, things), ground_in_chinese(background)
    return f"{drawn}，{ground}" if variant else f"{ground}上，{drawn}"


def english_with_chinese_ground(layout: str, things: tuple[Thing, ...], background: Background) -> str:
    return f"{_drawn_in_english(layout, things, 0)}，{ground_in_chinese(background)}"


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _drawn_in_english(layout: str, things: tuple[Thing, ...], variant: int) -> str:
    first = things[0]
    if layout == "character":
        wording = "a large {colour} Chinese character {shape}", "the character {shape} in {colour}"
        return wording[variant].format(colour=first.colour, shape=first.shape)
    if layout in COUNTS:
        return f"{layout} {first.colour} {_plural(first.shape)}"
    names = [with_article(" ".join(filter(None, (t.size, t.colour, t.shape)))) for t in things]
    if layout in ROWS:
        return f"{names[0]}, {names[1]} and {names[2]} {layout}"
    return " ".join(filter(None, (names[0], layout, *names[1:])))


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _ground_in_english(background: Background) -> str:
    match background.kind:
        case "gradient":
            return f"{background.first} to {background.second} gradient background"
        case "striped":
            return f"{background.first} and {background.second} striped background"
        case _:
            return f"{background.first} background"


def _drawn_in_chinese(layout: str, things: tuple[Thing, ...]) -> str:
    names = [CHINESE[t.size] + CHINESE[t.colour] + CHINESE.get(t.shape, t.shape) for t in things]
    if layout == "character":
        return f"一个大大的{CHINESE[things[0].colour]}“{things[0].shape}”字"
    if layout in COUNTS:
        return CHINESE[layout] + names[0]
    if layout in ROWS:
        return f"{CHINESE[layout]}是{names[0]}、{names[1]}和{names[2]}"
    if layout in RELATIONS:
        return f"{names[0]}在{names[1]}的{CHINESE[layout]}"
    return f"{CHINESE[layout]}{'有' if layout else ''}一个{names[0]}"


def ground_in_chinese(background: Background) -> str:
    first, second = CHINESE[background.first], CHINESE[background.second]
    match background.kind:
        case "gradient":
            return f"{first}到{second}的渐变背景"
        case "striped":
            return f"{first}和{second}的条纹背景"
        case _:
            return f"{first}背景"
