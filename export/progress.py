"""The export's progress bar."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from export.exporter import SHARES, Report


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar on standard error with the stage's name and the time left, in shares of the whole work."""
    total = sum(SHARES.values()) + 1
    layout = "{l_bar}{bar:24}| {elapsed} elapsed, {remaining} left"
    with tqdm(total=total, bar_format=layout, file=sys.stderr, mininterval=1, miniters=0) as bar:

        def report(stage: str, done: int) -> None:
            text = f"{stage:<31}"
            bar.set_description_str(text, refresh=text != bar.desc)  # a long build reports very often
            bar.update(done - bar.n)

        yield report
        bar.update(total - bar.n)
