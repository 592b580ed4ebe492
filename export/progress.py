"""How far an export is: a bar in a terminal, a line a stage in a log."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from export.exporter import SHARES, Report


@contextmanager
def progress_bar() -> Iterator[Report]:
    """On standard error: a bar with the stage's name and the time left, in shares of the whole work.

    Where that is no terminal, the name of each stage on a line of its own.
    """
    if not sys.stderr.isatty():
        yield _lines()
        return
    total = sum(SHARES.values()) + 1
    layout = "{l_bar}{bar:24}| {elapsed} elapsed, {remaining} left"
    with tqdm(total=total, bar_format=layout, file=sys.stderr, mininterval=1, miniters=0) as bar:

        def report(stage: str, done: int) -> None:
            text = f"{stage:<31}"
            bar.set_description_str(text, refresh=text != bar.desc)  # a long build reports very often
            bar.update(done - bar.n)

        yield report
        bar.update(total - bar.n)


def _lines() -> Report:
    last = ""

    def report(stage: str, done: int) -> None:
        nonlocal last
        if stage != last:
            sys.stderr.write(f"{stage} ...\n")
            sys.stderr.flush()
            last = stage

    return report
