"""A real `zserve serve` in a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import psutil

from client import ZImageClient
from tests.conftest import ROOT

T = TypeVar("T")

PATIENCE = 300.0  # seconds for what has to come about: only a failure takes so long, however slow the machine is


def wait_for(what: Callable[[], T | None], seconds: float = PATIENCE) -> T:
    """The first true value of `what`, asked again until it has one."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := what():
            return value
        time.sleep(0.05)
    raise AssertionError(f"nothing after {seconds} s")


class ServerProcess:
    """Starts the server on free ports; `with` waits until it is ready and stops it with SIGTERM."""

    def __init__(self, repository: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        # A file of its own: a pipe that nobody reads would block the server.
        with tempfile.NamedTemporaryFile("w", suffix=".log", delete=False) as log:
            self.log_file = Path(log.name)
            ports = ("--grpc-address", "127.0.0.1", "--grpc-port", "0", "--metrics-port", "0")
            self.process = subprocess.Popen(
                [sys.executable, "-m", "zserve", "serve", "--model-repository", str(repository), *ports, *arguments],
                cwd=ROOT,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )

    def __enter__(self) -> Self:
        self.wait_until_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def url(self) -> str:
        port = wait_for(lambda: re.search(r"gRPC on \S*:([0-9]+)", self.log))[1]
        return f"127.0.0.1:{port}"

    def wait_until_ready(self) -> None:
        wait_for(lambda: "ready: " in self.log or self.process.poll() is not None)
        assert self.process.poll() is None, self.log

    def client(self) -> ZImageClient:
        """Without a deadline: the server would refuse what a slow machine cannot do in time."""
        return ZImageClient(self.url)

    def metrics(self) -> str:
        port = wait_for(lambda: re.search(r"metrics on \S*:([0-9]+)", self.log))[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text: str = answer.read().decode()
        return text

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series; 0 when it is not there yet, though its family must be."""
        lines = self.metrics().splitlines()
        family = re.sub("_(count|sum|bucket)$", "", name)
        assert any(line.startswith((f"# TYPE {name} ", f"# TYPE {family} ")) for line in lines), f"no metric {name}"
        for line in lines:
            if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rpartition(" ")[2])
        return 0.0

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [p for p in psutil.Process(self.process.pid).children() if _is_worker(p)]
        return []

    def ended(self) -> int:
        """Waits until it ends by itself; returns the exit status."""
        return self.process.wait(PATIENCE)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[psutil.Process]:
        """Its one worker, stopped as by a debugger: whatever it has been given stays as it is."""
        worker = wait_for(self.workers)[0]
        worker.suspend()
        try:
            yield worker
        finally:
            worker.resume()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Sends the signal and returns the exit status."""
        self.process.send_signal(how)
        return self.process.wait(PATIENCE)


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie, which has no command line any more
        return "server.worker.main" in process.cmdline()
    return False


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended; nobody may have asked for its exit status yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True
