"""What a forward of each component costs: measured during warm-up, kept up to date by what is served since.

The planner batches by it, the dispatcher estimates starting times by it, and both refuse what cannot be done in time.
"""

from collections.abc import Iterable, Mapping

from export.spec import Component
from server.requests import StepCost

NEWS = 0.1  # weight of the newest measurement once a cost is known

_Key = tuple[Component, int, int]  # component, height, width


class CostTable:
    """Seconds of one forward by component, size in pixels and number of rows. The prompt encoder's size is 0 x 0."""

    def __init__(self, costs: Iterable[StepCost] = ()) -> None:
        self._seconds: dict[_Key, dict[int, float]] = {}
        for cost in costs:
            self._by_rows(cost.component, cost.height, cost.width)[cost.rows] = cost.seconds

    def observe(self, cost: StepCost) -> None:
        """Takes a measurement in: as it is where there was none, else as one among many."""
        by_rows = self._by_rows(cost.component, cost.height, cost.width)
        before = by_rows.get(cost.rows, cost.seconds)
        by_rows[cost.rows] = before + NEWS * (cost.seconds - before)

    def costs(self) -> tuple[StepCost, ...]:
        """The table as it is served."""
        return tuple(
            StepCost(height, width, rows, seconds, component)
            for (component, height, width), by_rows in self._seconds.items()
            for rows, seconds in by_rows.items()
        )

    def measured(self, height: int, width: int) -> Mapping[int, float]:
        """Seconds of a denoiser step at exactly this size, by rows; empty where none was measured."""
        return self._seconds.get((Component.DENOISER, height, width), {})

    def step(self, height: int, width: int, rows: int = 1) -> float:
        """Seconds of a denoiser step, scaled from the nearest measurement where there is none; 0 without any."""
        return self._estimate(Component.DENOISER, height, width, rows)

    def image(self, height: int, width: int, *, steps: int, rows: int) -> float:
        """Seconds of a whole image that has the device for itself."""
        stages = self._estimate(Component.PROMPT_ENCODER, 0, 0, 1) + self.decode(height, width)
        return stages + steps * self.step(height, width, rows)

    def decode(self, height: int, width: int) -> float:
        """Seconds of one image's decoding, scaled like `step`."""
        return self._estimate(Component.IMAGE_DECODER, height, width, 1)

    def _estimate(self, component: Component, height: int, width: int, rows: int) -> float:
        exact = self._seconds.get((component, height, width), {}).get(rows)
        if exact is not None:
            return exact
        known = [
            (h * w * r, seconds)
            for (c, h, w), by_rows in self._seconds.items()
            if c is component
            for r, seconds in by_rows.items()
        ]
        if not known:
            return 0.0
        wanted = height * width * rows
        pixels, seconds = min(known, key=lambda entry: abs(entry[0] - wanted))
        return seconds * wanted / pixels if pixels else seconds

    def _by_rows(self, component: Component, height: int, width: int) -> dict[int, float]:
        return self._seconds.setdefault((component, height, width), {})
