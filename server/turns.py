"""Whose turn is next: one ordering for both the dispatcher's queue and the planner's sequences.

Ranked by priority level, then by when the work is due, then by arrival. Two rules keep anything from starving: waiting
lifts a request by one level every `AGEING` seconds, and within a level a request without a deadline is due `PATIENCE`
seconds after it arrived. So nothing is overtaken by what arrives more than (priority - 1) * AGEING + PATIENCE after it,
except a request that has exceeded a queue timeout whose action is DELAY: as in Triton, it goes behind all others of its
level.
"""

import itertools
import operator
from bisect import insort
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
Rank = tuple[int, bool, float, float]  # smaller is sooner

AGEING = 30.0  # seconds of waiting that lift a request by one priority level
PATIENCE = 60.0  # seconds after its arrival a request without a deadline is due


@dataclass(frozen=True)
class Claim:
    """What a request's turn depends on. Seconds on one clock."""

    priority: int  # 1 is the highest
    arrived: float
    deadline: float | None = None
    delayed: bool = False  # its queue timeout has passed: behind all others of its level

    def level(self, now: float) -> int:
        """The priority, lifted by waiting."""
        return max(1, self.priority - int((now - self.arrived) / AGEING))

    def rank(self, now: float) -> Rank:
        """The sort key at `now`; it changes only when the level does."""
        due = self.arrived + PATIENCE
        if self.deadline is not None:
            due = min(due, self.deadline)
        return self.level(now), self.delayed, due, self.arrived

    def lifted_at(self, now: float) -> float:
        """When the level changes next; infinity at the top."""
        level = self.level(now)
        return float("inf") if level == 1 else self.arrived + AGEING * (self.priority - level + 1)


class Turns(Generic[T]):
    """Items in the order of their turns. Ranks are cached, and recomputed only when ageing has changed one."""

    def __init__(self, claim: Callable[[T], Claim]) -> None:
        self._claim = claim
        self._entries: list[_Entry[T]] = []
        self._numbers = itertools.count()  # equal ranks: first come, first served
        self._next_lift = float("inf")

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, item: T, now: float, *, number: int | None = None) -> int:
        """Inserts an item at its place; returns its number, which breaks ties and by default is the next one."""
        number = next(self._numbers) if number is None else number
        entry = self._entry(item, number, now)
        insort(self._entries, entry, key=_position)
        self._next_lift = min(self._next_lift, entry.lifted_at)
        return number

    def remove(self, leaving: Collection[T]) -> None:
        """Removes those of `leaving` that are present."""
        self._entries = [entry for entry in self._entries if entry.item not in leaving]

    def items(self) -> list[T]:
        """All items, in the order last computed; safe from any thread."""
        return [entry.item for entry in self._entries]

    def ordered(self, now: float) -> list[T]:
        """All items, the next one first."""
        self._age(now)
        return [entry.item for entry in self._entries]

    def top(self, now: float) -> list[T]:
        """The items of the highest level there is, the next one first."""
        self._age(now)
        if not self._entries:
            return []
        level = self._entries[0].rank[0]
        return [entry.item for entry in self._entries if entry.rank[0] == level]

    def _age(self, now: float) -> None:
        if now < self._next_lift:
            return
        self._entries = [e if now < e.lifted_at else self._entry(e.item, e.number, now) for e in self._entries]
        self._entries.sort(key=_position)
        self._next_lift = min((e.lifted_at for e in self._entries), default=float("inf"))

    def _entry(self, item: T, number: int, now: float) -> "_Entry[T]":
        claim = self._claim(item)
        return _Entry(claim.rank(now), number, claim.lifted_at(now), item)


class _Entry(NamedTuple, Generic[T]):
    rank: Rank
    number: int
    lifted_at: float
    item: T


_position = operator.itemgetter(0, 1)
