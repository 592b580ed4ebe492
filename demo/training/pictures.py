"""True pictures of many scenes at once, drawn with torch from the same outlines as `demo.scenes.render`."""

import numpy as np
import torch
from torch import Tensor

from demo.scenes import cover, ground_mix
from demo.shapes import DRAWABLE
from demo.training.config import Size
from demo.training.data import KINDS, PALETTE, SceneArrays
from demo.words import COLOURS


def draw(scenes: SceneArrays, size: Size, device: torch.device) -> Tensor:
    """Pictures in [-1, 1], float32 [n, 3, height, width]."""
    width, height = size
    x, y = _axis(width, device)[None, :], _axis(height, device)[:, None]
    ground = _grounds(scenes, x.expand(height, width), y.expand(height, width))
    picture = ground.clone()
    for index in np.unique(scenes.shapes[scenes.shapes >= 0]):
        rows, slots = np.nonzero(scenes.shapes == index)
        places = torch.from_numpy(scenes.places[rows, slots]).to(device)[:, :, None, None]
        offset = x - places[:, 0], y - places[:, 1]
        covered = cover(torch, DRAWABLE[index], offset, places[:, 2], size)
        owner = torch.from_numpy(rows).to(device)
        paint = _colours(scenes.colours[rows, slots], device)
        picture.index_add_(0, owner, covered[:, None] * (paint - ground[owner]))
    return picture


def _grounds(scenes: SceneArrays, x: Tensor, y: Tensor) -> Tensor:
    mixes = torch.stack([ground_mix(torch, kind, x, y) for kind in KINDS])
    mix = mixes[torch.from_numpy(scenes.grounds[:, 0]).to(x.device)][:, None]
    first, second = (_colours(scenes.grounds[:, column], x.device) for column in (1, 2))
    return first + mix * (second - first)


def _colours(indices: np.ndarray, device: torch.device) -> Tensor:
    """RGB in [-1, 1], float32 [n, 3, 1, 1]."""
    palette = np.array([COLOURS[name] for name in PALETTE], np.float32) / 127.5 - 1
    return torch.from_numpy(palette[indices]).to(device)[:, :, None, None]


def _axis(pixels: int, device: torch.device) -> Tensor:
    return (torch.arange(pixels, dtype=torch.float32, device=device) * 2 + 1) / pixels - 1
