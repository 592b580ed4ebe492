"""The shapes an engine is built for: the model's default size, fastest, and a range that takes everything served.

And those at which it is held against eager.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from export.spec import (
    CAPTION_MULTIPLE,
    EXPORT_EXAMPLE,
    MAX_PROMPT_TOKENS,
    MIN_SIZE,
    SIZE_MULTIPLE,
    ComponentSpec,
    ShapePoint,
)

TYPICAL_CAPTION = 2 * CAPTION_MULTIPLE  # most prompts, with the chat template around them
# None of these is the export example, so a dimension that was baked into the graph fails here.
ODD_POINTS = (ShapePoint(1, 32, 256, 256), ShapePoint(2, 96, 192, 320), ShapePoint(1, 64, 336, 208))


@dataclass(frozen=True)
class ShapeProfile:
    """Every shape from `minimum` to `maximum` can be run; `optimum` is what kernels are chosen for."""

    minimum: ShapePoint
    optimum: ShapePoint
    maximum: ShapePoint

    def input_shapes(self, spec: ComponentSpec) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
        """Name and (minimum, optimum, maximum) shape of each of the component's inputs."""
        for tensor in spec.inputs:
            yield tensor.name, tuple(tensor.shape(p) for p in (self.minimum, self.optimum, self.maximum))

    def takes(self, spec: ComponentSpec, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether inputs of these shapes are inside."""
        return all(
            len(low) == len(shapes[name])
            and all(a <= size <= b for a, size, b in zip(low, shapes[name], high, strict=True))
            for name, (low, _, high) in self.input_shapes(spec)
        )


def serving_profiles(default_size: tuple[int, int], max_rows: int, max_size: int) -> tuple[ShapeProfile, ShapeProfile]:
    """The profile of one image at the default size (width, height), then the one of everything that is served.

    The caption's length stays open in the first as well: fixing it would need one profile for each of its 16 values.
    """
    width, height = default_size
    longest = MAX_PROMPT_TOKENS
    fixed = ShapeProfile(
        minimum=ShapePoint(1, CAPTION_MULTIPLE, height, width),
        optimum=ShapePoint(1, TYPICAL_CAPTION, height, width),
        maximum=ShapePoint(1, longest, height, width),
    )
    ranged = ShapeProfile(
        minimum=ShapePoint(1, CAPTION_MULTIPLE, MIN_SIZE, MIN_SIZE),
        optimum=ShapePoint(min(2, max_rows), TYPICAL_CAPTION, height, width),
        maximum=ShapePoint(max_rows, longest, max_size, max_size),
    )
    return fixed, ranged


def tuning_example(profiles: Sequence[ShapeProfile]) -> ShapePoint:
    """Near the default size, for compilers that choose kernels by the example; as general as `EXPORT_EXAMPLE`."""
    fixed, ranged = profiles
    served, room = fixed.optimum, ranged.maximum
    longer, shorter, step = max(served.height, served.width), min(served.height, served.width), 2 * SIZE_MULTIPLE
    width = next(w for w in (longer + step, shorter - step, shorter + step) if MIN_SIZE <= w <= room.width)
    return replace(served, batch=EXPORT_EXAMPLE.batch, width=width)


def parity_points(default_size: tuple[int, int], max_rows: int, max_size: int) -> tuple[ShapePoint, ...]:
    """Where an engine is held against eager: at odd shapes, as it serves one image by default, and at its limits.

    These are all its rows and the longest caption. Only the default size may be large, as eager computes all of them
    too, if need be on a CPU.
    """
    width, height = default_size
    odd = (replace(p, height=min(p.height, max_size), width=min(p.width, max_size)) for p in ODD_POINTS)
    served = ShapePoint(1, TYPICAL_CAPTION, height, width)
    rows = ShapePoint(max_rows, CAPTION_MULTIPLE, MIN_SIZE, MIN_SIZE)
    return (*odd, served, rows, ShapePoint(1, MAX_PROMPT_TOKENS, MIN_SIZE, MIN_SIZE))
