"""Which sequences advance next. Pure policy: no torch, no clock of its own, no threads.

The planner works through the sequences in the order of `Turns`, one priority level at a time: finished ones are decoded
first, then the first in turn takes its step together with as many equal ones as the measured costs justify.
Equal work is not interleaved: that would make all of it late. A sequence that can no longer meet its deadline is
dropped. One that has not taken a step is dropped as soon as the work ahead of it leaves too little time: at its turn it
would only take time that the next one needs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from export.spec import Component
from server.costs import CostTable
from server.requests import StepCost
from server.turns import Claim, Turns
from server.worker.batching import Batching, BatchPolicy, StepShape
from server.worker.busyness import Load


class Stage(Enum):
    """What a sequence needs next."""

    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"


@dataclass(eq=False)
class PlannedSequence:
    """One image on its way through the stages, as the planner sees it."""

    key: int  # of its request; all images of a request share it
    shape: StepShape
    steps: int
    claim: Claim
    stage: Stage = Stage.ENCODE
    step: int = 0  # steps done
    latest: float = float("inf")  # when its next stage has to begin for the deadline to be met
    number: int = 0  # its place among equals, kept while it is set aside

    @property
    def left(self) -> int:
        """Steps to go."""
        return self.steps - self.step

    @property
    def started(self) -> bool:
        """Whether the device has begun with it."""
        return self.stage is not Stage.ENCODE


@dataclass(frozen=True)
class Plan:
    """One stage to run now, for these sequences together."""

    stage: Stage
    sequences: tuple[PlannedSequence, ...]


@dataclass(frozen=True)
class Wait:
    """Nothing to run before `until`, or until something arrives: a batch is waiting for company."""

    until: float


@dataclass(frozen=True)
class Forecast:
    """When a request is expected to begin: behind `position` others, at `starts` on the planner's clock."""

    position: int
    starts: float


@dataclass(frozen=True)
class _Cost:
    """A sequence's share of the device's time, in seconds: encoding its prompts, a step, decoding its image."""

    encode: float
    step: float
    decode: float

    def seconds(self, sequence: PlannedSequence) -> float:
        """Seconds that `sequence` still takes."""
        encode = 0.0 if sequence.started else self.encode
        return encode + sequence.left * self.step + self.decode


class Planner:
    """Holds the sequences that are under way and says what to run next."""

    def __init__(self, costs: CostTable, batches: BatchPolicy) -> None:
        self._costs = costs
        self._batching = Batching(costs, batches)
        self._turns = Turns[PlannedSequence](lambda s: s.claim)
        self._aside: list[PlannedSequence] = []
        self._begun: set[int] = set()  # keys of requests with an image that has begun, or is done
        self._beside = CostTable()  # how long encoding and decoding take beside steps, from their start
        self._load = Load()

    def __len__(self) -> int:
        """The number of sequences to plan, without those set aside."""
        return len(self._turns)

    def add(self, sequence: PlannedSequence, now: float) -> None:
        """Takes a sequence in."""
        self._note_latest(sequence)
        sequence.number = self._turns.add(sequence, now)
        self._load.note(now, busy=True)

    def remove(self, key: int, now: float) -> None:
        """Takes out all sequences of a request that was cancelled or failed; unknown ones are ignored."""
        self._turns.remove([s for s in self._turns.ordered(now) if s.key == key])
        self._aside = [s for s in self._aside if s.key != key]
        self._begun.discard(key)
        self._load.note(now, busy=bool(len(self._turns) or self._aside))  # without work, `plan` is not called

    def set_aside(self, sequence: PlannedSequence) -> None:
        """A stage of the sequence runs beside the others: it is not planned until it is taken back."""
        self._turns.remove([sequence])
        self._aside.append(sequence)
        self._begun.add(sequence.key)

    def take_back(self, sequence: PlannedSequence, now: float) -> bool:
        """Plans the sequence again, as that stage is over; False if it was removed meanwhile."""
        if sequence not in self._aside:
            return False
        self._aside.remove(sequence)
        self._turns.add(sequence, now, number=sequence.number)
        return True

    def hopeless(self, now: float, free: float = 0.0) -> list[PlannedSequence]:
        """The sequences that will not meet their deadlines. The device is busy until `free`.

        One that has taken a step is listed if it will be late even with the device to itself from then on; one that
        has not, if it will be late behind those that go before it and will meet theirs.
        """
        hopeless = []
        ordered = self._turns.ordered(now)
        if all(s.claim.deadline is None for s in ordered):
            return []
        costs = self._costs_in_company(ordered)
        alone = behind = max(now, free)
        for sequence in ordered:
            if sequence.stage is Stage.DECODE:
                begins = now
            elif sequence.step:
                begins = alone
            else:
                begins = behind + self._held_up(sequence)
            if begins >= sequence.latest:
                hopeless.append(sequence)
            else:
                behind += costs[sequence.shape].seconds(sequence)
        return hopeless

    def plan(self, now: float) -> Plan | Wait | None:
        """What to run next; None when there is nothing to do."""
        self._load.note(now, busy=bool(len(self._turns) or self._aside))
        peers = self._turns.top(now)
        if not peers:
            return None
        finished = next((s for s in peers if s.stage is Stage.DECODE), None)
        if finished is not None:
            return Plan(Stage.DECODE, (finished,))
        mates = [s for s in peers if s.shape == peers[0].shape]
        return self._wait_for_company(mates, now) or self._next_step(mates, now)

    def advance(self, plan: Plan) -> None:
        """Notes that `plan` was run: its sequences move on, and those that were decoded leave."""
        for sequence in plan.sequences:
            match plan.stage:
                case Stage.ENCODE:
                    sequence.stage = Stage.DENOISE
                    self._begun.add(sequence.key)
                case Stage.DENOISE:
                    sequence.step += 1
                    if sequence.left == 0:
                        sequence.stage = Stage.DECODE
                case Stage.DECODE:
                    self._turns.remove(plan.sequences)
            self._note_latest(sequence)

    def restart(self, sequence: PlannedSequence) -> None:
        """Sends a sequence back to its first step: what it had so far was wrong."""
        sequence.stage, sequence.step = Stage.DENOISE, 0
        self._note_latest(sequence)

    def limit_batch(self, shape: StepShape, count: int) -> None:
        """Caps steps of this shape at `count` sequences: there was no memory for more."""
        self._batching.limit(shape, count)

    def expected_seconds(self, plan: Plan) -> float:
        """Seconds that `plan` should take; 0 for encoding, which is short, and where nothing was measured."""
        shape = plan.sequences[0].shape
        match plan.stage:
            case Stage.ENCODE:
                return 0.0
            case Stage.DENOISE:
                return self._batching.seconds(shape, len(plan.sequences))
            case Stage.DECODE:
                return self._costs.decode(shape.height, shape.width)

    def observe(self, plan: Plan, seconds: float) -> None:
        """Records the cost of a `plan` that had the device to itself; for encoding, the cost per prompt."""
        self._observe(self._costs, plan, seconds)

    def observe_beside(self, plan: Plan, seconds: float) -> None:
        """Records how long encoding or decoding took beside other work, which goes first."""
        self._observe(self._beside, plan, seconds)

    @staticmethod
    def _observe(costs: CostTable, plan: Plan, seconds: float) -> None:
        shape, count = plan.sequences[0].shape, len(plan.sequences)
        match plan.stage:
            case Stage.ENCODE:
                costs.observe(StepCost(0, 0, 1, seconds, Component.PROMPT_ENCODER))
            case Stage.DENOISE if shape.one_forward:
                costs.observe(StepCost(shape.height, shape.width, count * shape.rows, seconds))
            case Stage.DECODE:
                costs.observe(StepCost(shape.height, shape.width, 1, seconds, Component.IMAGE_DECODER))

    def forecast(self, now: float) -> dict[int, Forecast]:
        """By key, when each request that has not begun is expected to, if nothing more urgent arrives."""
        ordered = self._turns.ordered(now)
        costs = self._costs_in_company(ordered)
        forecasts: dict[int, Forecast] = {}
        starts = now
        for sequence in ordered:
            if sequence.key not in self._begun:
                forecasts.setdefault(sequence.key, Forecast(len(forecasts), starts))
            starts += costs[sequence.shape].seconds(sequence)
        return forecasts

    def _next_step(self, mates: list[PlannedSequence], now: float) -> Plan:
        """A step for the first of `mates` and those that share it, or an encoding that this step still needs."""
        count = self._count(mates[0].shape, len(mates), self._longest_step(mates[0], now))
        company = mates[:count]
        unencoded = next((s for s in company if s.stage is Stage.ENCODE), None)
        return Plan(Stage.DENOISE, tuple(company)) if unencoded is None else Plan(Stage.ENCODE, (unencoded,))

    def _count(self, shape: StepShape, waiting: int, most_seconds: float) -> int:
        return self._batching.count(shape, waiting, most_seconds, self._load.share)

    def _wait_for_company(self, mates: list[PlannedSequence], now: float) -> Wait | None:
        """The window opens when the first one arrives; later arrivals do not prolong it."""
        first, full = mates[0], self._batching.largest(mates[0].shape)
        until = first.claim.arrived + self._batching.max_delay
        if now >= until or first.step > 0:
            return None
        worth_it = self._count(first.shape, full, self._longest_step(first, until)) > len(mates)
        return Wait(until) if worth_it else None

    def _longest_step(self, sequence: PlannedSequence, now: float) -> float:
        """Seconds that each remaining step of `sequence` may take if it is to meet its deadline."""
        if sequence.claim.deadline is None:
            return float("inf")
        decode = self._costs.decode(sequence.shape.height, sequence.shape.width) + self._held_up(sequence)
        return (sequence.claim.deadline - now - decode) / sequence.left

    def _note_latest(self, sequence: PlannedSequence) -> None:
        if sequence.claim.deadline is not None:
            alone = self._cost(sequence.shape, 1)
            sequence.latest = sequence.claim.deadline - alone.seconds(sequence)

    def _held_up(self, sequence: PlannedSequence) -> float:
        """Seconds that other sequences will add to its encoding and decoding; 0 if there are none."""
        if len(self._turns) + len(self._aside) == 1:
            return 0.0
        height, width, _ = sequence.shape
        encode = 0.0 if sequence.started else max(0.0, self._beside.encode() - self._costs.encode())
        return encode + max(0.0, self._beside.decode(height, width) - self._costs.decode(height, width))

    def _costs_in_company(self, sequences: Sequence[PlannedSequence]) -> dict[StepShape, "_Cost"]:
        """By shape, the cost of each of `sequences` when they share steps as the policy would have them."""
        return {
            shape: self._cost(shape, self._count(shape, waiting, float("inf")))
            for shape, waiting in Counter(s.shape for s in sequences).items()
        }

    def _cost(self, shape: StepShape, count: int) -> "_Cost":
        """The cost of each sequence when `count` share a step."""
        step = self._batching.seconds(shape, count) / count
        return _Cost(shape.rows * self._costs.encode(), step, self._costs.decode(shape.height, shape.width))
