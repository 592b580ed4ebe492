"""What TensorRT calls while it builds a plan. It ignores exceptions that are raised there (seen with 1.7.1)."""

from collections.abc import Callable
from typing import BinaryIO

from export.plans import Foreign


def plan_writer(trt: Foreign, file: BinaryIO) -> Foreign:
    """Writes a plan to `file` piece by piece. Its `error` is what made it stop, of which TensorRT takes no notice."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None

        def write(self, data: bytes) -> int:
            try:
                return 0 if self.error else file.write(data)
            except (OSError, KeyboardInterrupt) as error:
                self.error = error
                return 0

    return Writer()


def build_monitor(trt: Foreign, report: Callable[[], None]) -> Foreign:
    """Calls `report` at every step of a build, and ends the build when that is interrupted."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            """Of no interest, but it has to be there."""

        def phase_finish(self, phase: str) -> None:
            """As `phase_start`."""

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                report()
            except KeyboardInterrupt:
                return False
            return True

    return Monitor()
