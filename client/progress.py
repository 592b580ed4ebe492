"""A live line of progress over all requests of a command."""

import shutil
import sys
import time
from typing import TextIO

from protos.zserve.v1 import image_generation_pb2 as pb

BAR = 24


class StepBar:
    """Counts the steps of several images; redraws one line on a terminal, and stays silent elsewhere."""

    def __init__(self, images: int, stream: TextIO | None = None) -> None:
        self._images, self._stream = images, sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._steps: dict[tuple[int, int], tuple[int, int]] = {}  # (prompt, image) -> (done, of)
        self._finished = 0
        self._state = "queued"
        self._began = time.monotonic()

    def see(self, prompt: int, event: pb.GenerateEvent) -> None:
        """Takes in an event of the prompt with this number."""
        match event.WhichOneof("event"):
            case "queued":
                self._state = f"queued behind {event.queued.position}" if event.queued.position else "queued"
            case "progress":
                progress = event.progress
                self._steps[prompt, progress.image_index] = (progress.step, progress.of)
                self._state = "drawing"
            case "image":
                self._finished += 1
        self._draw()

    def line(self) -> str:
        """The line as it stands."""
        done = sum(step for step, _ in self._steps.values())
        each = max((of for _, of in self._steps.values()), default=1)
        share = min(1.0, done / max(1, each * self._images))
        filled = round(share * BAR)
        bar = "#" * filled + "-" * (BAR - filled)
        seconds = time.monotonic() - self._began
        counts = f"step {done}/{each * self._images}  image {self._finished}/{self._images}"
        return f"[{bar}] {counts}  {seconds:5.1f} s  {self._state}"

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._live:
            self._stream.write("\r\033[K")
        self._stream.write(text + "\n")
        self._draw()

    def close(self) -> None:
        """Erases the line."""
        if self._live:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def _draw(self) -> None:
        if self._live:
            # Of a line longer than the terminal is wide, only the last row would be erased.
            self._stream.write("\r\033[K" + self.line()[: shutil.get_terminal_size().columns - 1])
            self._stream.flush()
