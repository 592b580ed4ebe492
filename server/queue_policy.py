"""How a model's requests wait: the `dynamic_batching` of its `config.pbtxt`, in Triton's terms."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from server.errors import ConfigError

DEFAULT_MAX_QUEUE_SIZE = 128  # requests: Triton's 0 means no bound; a queue without one only hides an overload
DEFAULT_PRIORITY_LEVELS = 8

BATCHING_FIELDS = {
    "preferred_batch_size",
    "max_queue_delay_microseconds",
    "priority_levels",
    "default_priority_level",
    "default_queue_policy",
    "priority_queue_policy",
}


class TimeoutAction(StrEnum):
    """What happens to a request that has waited past its queue timeout."""

    REJECT = "reject"
    DELAY = "delay"  # it goes behind all others of its level


@dataclass(frozen=True)
class LevelPolicy:
    """The queue of one priority level. Seconds."""

    max_size: int | None = DEFAULT_MAX_QUEUE_SIZE  # None: no bound
    timeout: float | None = None
    on_timeout: TimeoutAction = TimeoutAction.REJECT
    request_may_set_timeout: bool = False

    def timeout_of(self, asked: float | None) -> float | None:
        """The timeout of a request that asked for `asked`: it may shorten the policy's, and only where allowed."""
        if asked is None or not self.request_may_set_timeout:
            return self.timeout
        return asked if self.timeout is None else min(asked, self.timeout)


@dataclass(frozen=True)
class QueuePolicy:
    """All levels, and how long a batch waits to fill up."""

    levels: int = DEFAULT_PRIORITY_LEVELS
    default_level: int = DEFAULT_PRIORITY_LEVELS // 2
    default: LevelPolicy = field(default_factory=LevelPolicy)
    by_level: tuple[tuple[int, LevelPolicy], ...] = ()  # of the levels that have one of their own
    preferred_batch_sizes: tuple[int, ...] = ()
    max_delay: float = 0.0

    def level_of(self, asked: int) -> int:
        """The level of a request over Triton's protocol, where anything but a valid level means the default."""
        return asked if 1 <= asked <= self.levels else self.default_level

    def of(self, priority: int) -> LevelPolicy:
        """The policy of a priority level."""
        return dict(self.by_level).get(priority, self.default)


def read_queue_policy(batching: Any, where: str, *, max_size: int | None = DEFAULT_MAX_QUEUE_SIZE) -> QueuePolicy:
    """From the ModelDynamicBatching message of a `config.pbtxt`; `max_size` is for levels that set none.

    Raises:
        ConfigError: it sets something this server does not serve, or levels that do not fit each other.
    """
    unknown = {f.name for f, _ in batching.ListFields()} - BATCHING_FIELDS
    if unknown:
        raise ConfigError(f"{where}: dynamic_batching {sorted(unknown)} not supported; {sorted(BATCHING_FIELDS)} are")
    levels = batching.priority_levels or DEFAULT_PRIORITY_LEVELS
    default_level = batching.default_priority_level or (levels + 1) // 2
    wrong = [level for level in (default_level, *batching.priority_queue_policy) if not 1 <= level <= levels]
    if wrong:
        raise ConfigError(f"{where}: priority level {wrong[0]} is not accepted; 1 to priority_levels ({levels}) are")
    return QueuePolicy(
        levels=levels,
        default_level=default_level,
        default=_level_policy(batching.default_queue_policy, max_size),
        by_level=tuple(
            (level, _level_policy(policy, max_size)) for level, policy in batching.priority_queue_policy.items()
        ),
        preferred_batch_sizes=tuple(batching.preferred_batch_size),
        max_delay=batching.max_queue_delay_microseconds / 1e6,
    )


def _level_policy(policy: Any, max_size: int | None) -> LevelPolicy:
    """From a ModelQueuePolicy message; there, as in Triton, 0 means no timeout."""
    return LevelPolicy(
        max_size=policy.max_queue_size or max_size,
        timeout=policy.default_timeout_microseconds / 1e6 or None,
        on_timeout=TimeoutAction.DELAY if policy.timeout_action == policy.DELAY else TimeoutAction.REJECT,
        request_may_set_timeout=policy.allow_timeout_override,
    )
