"""How a worker process is started, and what it prints before it serves: a line per component it is about to run.

The frontend keeps the end of this output for when the process ends: before it was ready, the last line names the engine
that ended it, or the error that made it give up.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from export.spec import Component
from server.config import FallbackPolicy
from server.errors import ConfigError
from server.settings import LogFormat, LogSettings

ANNOUNCEMENT = "running the engine of "


@dataclass(frozen=True)
class WorkerConfig:
    """What one worker process is told on its command line."""

    model: Path  # the model's folder in the repository
    version: str
    instance: str
    socket: Path
    device: str
    threads: int  # for work inside one operator, on the CPU
    fallback: FallbackPolicy
    accepted: Path  # a folder of the model's name with the config.pbtxt in effect: `model`'s may have changed since
    patience: float = 60.0  # seconds after which a device that does not come back is given up
    start_patience: float = 1800.0  # seconds after which a process that is not ready is given up
    disabled: Mapping[Component, str] = field(default_factory=dict)  # engines not to be loaded, and why
    log: LogSettings = field(default_factory=LogSettings)

    def arguments(self) -> list[str]:
        """As command-line arguments, which `parse` reads back."""
        texts = {"disabled": json.dumps(self.disabled), "log": json.dumps(asdict(self.log))}
        values = {f.name: getattr(self, f.name) for f in fields(self)} | texts
        return [f"--{name}={value}" for name, value in values.items()]

    @classmethod
    def parse(cls, arguments: list[str]) -> "WorkerConfig":
        """The inverse of `arguments`."""
        values = dict(a.removeprefix("--").split("=", 1) for a in arguments)
        unknown = set(values) ^ {f.name for f in fields(cls)}
        if unknown:
            raise ConfigError(f"a worker takes exactly {[f.name for f in fields(cls)]}; check {sorted(unknown)}")
        return cls(
            model=Path(values["model"]),
            version=values["version"],
            instance=values["instance"],
            socket=Path(values["socket"]),
            device=values["device"],
            threads=int(values["threads"]),
            fallback=FallbackPolicy(values["fallback"]),
            accepted=Path(values["accepted"]),
            patience=float(values["patience"]),
            start_patience=float(values["start_patience"]),
            disabled={Component(name): reason for name, reason in json.loads(values["disabled"]).items()},
            log=LogSettings(**(log := json.loads(values["log"])) | {"log_format": LogFormat(log["log_format"])}),
        )


def announce(component: Component) -> None:
    """Says that the engine of `component` runs next, in case it ends the process."""
    sys.stdout.write(f"{ANNOUNCEMENT}{component}\n")
    sys.stdout.flush()


def announced(said: str) -> Component | None:
    """The component whose engine ran last, if its announcement is the last thing the process printed."""
    last = said.strip().rpartition("\n")[2]
    return Component(last.removeprefix(ANNOUNCEMENT)) if last.startswith(ANNOUNCEMENT) else None
