"""What a forward of each component costs: measured during warm-up, then kept up to date by what is served.

The planner batches by it, the dispatcher estimates starting times from it, and both refuse what cannot be done in time.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median_low

from export.spec import Component
from server.requests import StepCost

# A cost is the median of this many measurements, so that a single slow one, such as a first run with its setup, changes
# nothing. A batch size that once looked expensive would not be chosen again, and so never be corrected.
RECENT = 9

# Sizes per component whose costs are kept, those measured last. Over 15,000 sizes are legal, and every heartbeat
# carries the whole table; a size that was dropped is estimated from the nearest one.
SIZES = 256

_Key = tuple[Component, int, int]  # component, height, width


class CostTable:
    """Seconds of one forward by component, size in pixels and number of rows. The prompt encoder's size is 0 x 0.

    Only one thread may take measurements in; any may read.
    """

    def __init__(self, costs: Iterable[StepCost] = ()) -> None:
        self._seconds: dict[_Key, dict[int, float]] = {}  # in order of the latest measurement
        self._recent: dict[tuple[_Key, int], deque[float]] = {}
        self._images: dict[tuple[int, int, int, int], float] = {}  # what `image` has said since the last measurement
        self._take_in(costs)

    def observe(self, cost: StepCost) -> None:
        """Takes a measurement in, as one of the last `RECENT`."""
        self._take_in((cost,))

    def _take_in(self, costs: Iterable[StepCost]) -> None:
        seconds = self._seconds.copy()  # replaced as a whole: whoever is reading the table still has it as it was
        for cost in costs:
            key = cost.component, cost.height, cost.width
            recent = self._recent.setdefault((key, cost.rows), deque(maxlen=RECENT))
            recent.append(cost.seconds)
            by_rows = seconds.pop(key, None)
            if by_rows is None:
                self._make_room(seconds, cost.component)
            seconds[key] = {**(by_rows or {}), cost.rows: median_low(recent)}
        self._seconds, self._images = seconds, {}

    def _make_room(self, seconds: dict[_Key, dict[int, float]], component: Component) -> None:
        """Makes room for one more size."""
        if len(seconds) < SIZES:
            return
        keys = [key for key in seconds if key[0] is component]
        if len(keys) == SIZES:
            for rows in seconds.pop(keys[0]):
                del self._recent[keys[0], rows]

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
        """Seconds of a whole image of `rows` prompts that has the device to itself."""
        images, asked = self._images, (height, width, steps, rows)
        if asked not in images:  # a forecast asks the same of every waiting request
            stages = rows * self.encode() + self.decode(height, width)
            images[asked] = stages + steps * self.step(height, width, rows)
        return images[asked]

    def encode(self) -> float:
        """Seconds of one prompt's encoding; 0 before one was measured."""
        return self._estimate(Component.PROMPT_ENCODER, 0, 0, 1)

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
