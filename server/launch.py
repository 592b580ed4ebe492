"""How a worker process is started, and what it prints before it serves: a line per component it is about to run.

The frontend keeps the end of this output for when the process ends: before it was ready, the last line names the engine
that ended it, or the error that made it give up.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from export.parsing import parsed
from export.spec import Component
from server.config import FallbackPolicy, ModelConfig
from server.errors import ConfigError
from server.settings import LogSettings

ANNOUNCEMENT = "running the engine of "


@dataclass(frozen=True)
class WorkerConfig:
    """What one worker process is told on its command line."""

    folder: Path  # the model's, with the versions' folders
    model: ModelConfig  # as it was loaded, since config.pbtxt may have changed; without the policies of levels
    version: str
    instance: str
    socket: Path
    device: str
    threads: int  # for work inside one operator, on the CPU
    fallback: FallbackPolicy
    patience: float  # seconds after which a device that does not come back is given up
    start_patience: float  # seconds after which a process that is not ready is given up
    disabled: dict[Component, str] = field(default_factory=dict)  # engines not to be loaded, and why
    log: LogSettings = field(default_factory=LogSettings)

    def arguments(self) -> list[str]:
        """As command-line arguments, which `parse` reads back."""
        return [json.dumps(asdict(self), default=str)]

    @classmethod
    def parse(cls, arguments: list[str]) -> "WorkerConfig":
        """The inverse of `arguments`.

        Raises:
            ConfigError: there is not just one; by hand nobody starts a worker.
        """
        if len(arguments) != 1:
            raise ConfigError("a worker takes its settings as one JSON argument, as `zserve serve` starts it")
        config: WorkerConfig = parsed(cls, json.loads(arguments[0]))
        return config


def announce(component: Component) -> None:
    """Says that the engine of `component` runs next, in case it ends the process."""
    sys.stdout.write(f"{ANNOUNCEMENT}{component}\n")
    sys.stdout.flush()


def announced(said: str) -> Component | None:
    """The component whose engine ran last, if its announcement is the last thing the process printed."""
    last = said.strip().rpartition("\n")[2]
    name = last.removeprefix(ANNOUNCEMENT)
    # A process that is ended as it prints may leave half a name.
    return Component(name) if last.startswith(ANNOUNCEMENT) and name in set(Component) else None
